"""Messages about what the system refuses: each errno has its own fix, and no value makes a line long or acts on a terminal."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from tinydiff.errors import ModelError, ResourceError
from tinydiff.system import FIX, LONGEST, cut, named, shown, told, unreadable

FROM_THE_DISK = {"EIO", "EUCLEAN", "EREMOTEIO", "EBADMSG"}
WORDS = {  # what its fix has to say
    "EMFILE": "ulimit -n",
    "ENFILE": "files open",
    "ENOMEM": "memory",
    "ENOSPC": "space",
    "EDQUOT": "space",
    "EEXIST": "remove",
    "ENOTEMPTY": "remove",
    "ENOTDIR": "folders alone",
    "EISDIR": "no folder",
    "ENAMETOOLONG": "shorter name",
    "ELOOP": "links",
    "ETXTBSY": "program",
    "EBUSY": "program",
    "EIO": "check the disk",
    "ENODEV": "connected",
    "ESTALE": "network drive",
    "EINVAL": "another file system",
    "ENOLCK": "another file system",
    "EROFS": "writable",
    "EACCES": "writable",
    "EPERM": "writable",
    "EFBIG": "size limit",
    "ENOENT": "path",
}


@pytest.mark.parametrize("number", sorted(errno.errorcode.keys() - {errno.EPIPE, errno.ESHUTDOWN}))
def test_every_errno_has_a_fix_and_only_the_disk_is_told_to_be_checked(number):
    name = errno.errorcode[number]
    with pytest.raises(ResourceError) as caught, named("out/a.png"):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith("out/a.png: ") and message.count("; ") == 1
    assert ("check the disk" in message) == (name in FROM_THE_DISK)
    assert WORDS.get(name, "") in message.rpartition("; ")[2]


def test_all_that_have_words_are_in_the_table():
    assert {getattr(errno, name) for name in WORDS} <= FIX.keys()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO])
def test_what_rust_reports_is_told_alike(number):
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(ResourceError, match=f"^a: {os.strerror(number)}; "), named("a"):
        raise SafetensorError(text)
    with pytest.raises(ValueError, match="other"), named("a"):
        raise ValueError("other")


def test_readers_are_told_what_helps_a_reader():
    """A file that is missing or not readable is the model's fault; a limit of the system is not."""
    for number, kind, fix in [
        (errno.EACCES, ModelError, "make it readable"),
        (errno.ENOENT, ModelError, "check the path"),
        (errno.EIO, ModelError, "check the disk"),
        (errno.EMFILE, ResourceError, "ulimit -n"),
        (errno.ENOMEM, ResourceError, "free some memory"),
    ]:
        error = unreadable(OSError(number, os.strerror(number), "m/unet/config.json"), "m")
        assert type(error) is kind and str(error).startswith("m/unet/config.json: ") and fix in str(error)


def test_temporary_names_are_told_as_those_they_are_made_for():
    inner = "/a/.tmp-tinydiff-0123456789abcdef/new/unet/w.safetensors"
    for where, wanted in {inner: "/b/out/unet/w.safetensors", str(Path(inner).parents[2]): "/b/out"}.items():
        assert told(OSError(28, "No space", where), "/b/out") == f"{wanted}: No space; free some space"


def test_shown_escapes_what_a_terminal_acts_on():
    assert shown(Path("bilder/grün [/red].png")) == "bilder/grün [/red].png"
    assert shown("a\nb\x1b[31m\udcff") == r"'a\nb\x1b[31m\udcff'"


def test_a_long_path_keeps_its_end():
    path = "/".join(["folder"] * 500) + "/unet/config.json"
    assert shown(path).endswith("/unet/config.json") and shown(path).startswith("folder/") and "..." in shown(path)


@given(st.text(max_size=3000))
def test_every_value_is_short_and_printable(text):
    assert len(shown(text)) <= LONGEST and shown(text).isprintable()
    assert cut(text, 50) == text if len(text) <= 50 else len(cut(text, 50)) == 50
    assert len(told(OSError(5, text, text), text)) < 2 * LONGEST + 30
