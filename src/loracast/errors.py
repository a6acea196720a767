"""The errors a caller may want to catch. Every message says what is wrong and what to do about it."""

from __future__ import annotations

LEARN_AGAIN = "delete it (`loracast rm`), and learn the document again"
"""What to do about an adapter whose files are damaged."""


class LoracastError(Exception):
    """Anything loracast refuses to do; `str(error)` names the cause and the remedy."""


class DocumentError(LoracastError):
    """A file that cannot become text: encrypted, empty, scanned-only, truncated, of an unknown kind."""


class BaseModelError(LoracastError):
    """A base that cannot be fetched, verified, loaded or targeted."""


class PromptTooLong(BaseModelError):
    """A prompt that leaves no room for the answer in the base's context window."""


class PackageError(LoracastError):
    """A packaged model that cannot be fetched or is not the pinned one."""


class EncoderError(LoracastError):
    """A text encoder that cannot be fetched, verified, loaded or used."""


class AdapterError(LoracastError):
    """An adapter file that is damaged, foreign or does not fit the base in use."""


class NoSuchAdapterError(AdapterError):
    """A name, version or pattern that no adapter of the library has."""


class NameTakenError(AdapterError):
    """A name that another adapter of the library has already."""


class HypernetworkError(LoracastError):
    """A hypernetwork checkpoint that is damaged or belongs to another base."""


class ConfigError(LoracastError):
    """Settings that contradict each other, or an unknown key."""


class TrainingError(LoracastError):
    """Training that cannot start, go on or be resumed."""
