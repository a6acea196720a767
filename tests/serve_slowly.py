"""A program that serves a tiny base whose forward passes take 20 ms: BASE HYPERNETWORK LIBRARY; it prints its port."""

from __future__ import annotations

import sys
import time

import loracast
from loracast.serving.app import create_app
from loracast.serving.engine import LocalEngine
from loracast.serving.run import bound, run
from loracast.serving.settings import ServerSettings

if __name__ == "__main__":
    base, hypernetwork, library = sys.argv[1:]
    model = loracast.load(base, hypernetwork, library=library, device="cpu")
    model.base.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    settings = ServerSettings(port=0)
    app = create_app(model, LocalEngine(model.base), settings)
    with bound(settings) as sock:
        run(app, settings, sock, lambda port: print(port, flush=True))
