"""Run the storage initializer as another user.

Usage: initializer_as_user.py USER GROUP [ARGUMENT ...]. Libraries are imported as root, because the other user may not
have access to them.
"""

import encodings.idna
import os
import runpy
import sys

import hf_xet  # type: ignore[import-untyped]
import httpx2
import huggingface_hub.file_download
import huggingface_hub.hf_api

import storage_initializer.cli.main
import storage_initializer.sources.hub
import storage_initializer.sources.local

LOADED = (encodings.idna, hf_xet, httpx2, huggingface_hub, storage_initializer)

if __name__ == "__main__":
    user, group = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    os.setgroups([])
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    runpy.run_module("storage_initializer", run_name="__main__", alter_sys=True)
