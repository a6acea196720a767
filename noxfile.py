"""The tests on every Python that pyproject.toml claims: `nox`, or `nox -s tests-3.13 -- tests/answering/test_api.py`.

The interpreters have to be on the PATH; the session of one that is missing is skipped, or fails where CI is set.
"""

import nox

PYTHONS = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Install the package with its extras into a new environment, and run the tests or those that are named."""
    session.install("-e", ".[dev]")
    session.run("loracast", "pull")
    session.run("python", "-m", "pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})
