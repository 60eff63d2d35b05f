"""Files under injected failures: the previous version or the new one is there and verifies, never neither."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from tinydiff import files, temporary, verified
from tinydiff.errors import BusyError, ModelError, ResourceError, UsageError
from tinydiff.files import again, committed, lock, present, read_json, stamp, undisturbed, write_file
from tinydiff.verified import verify


def write_folder(path: Path, text: str, replace: bool = False) -> None:
    with committed(path, replace=replace) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "config.json").write_text(json.dumps({"text": text}))
        (folder / "weights.bin").write_text(text * 1000)


def text_of(path: Path) -> str:
    """What a reader finds, who changes nothing."""
    verify(path)
    return read_json(present(path) / "unet" / "config.json")["text"]


@pytest.fixture(params=["exchange", "renames"])
def way(request, monkeypatch) -> str:
    """Whether the file system can exchange two names."""
    if request.param == "renames":
        monkeypatch.setattr(temporary, "exchange", lambda *_: False)
    return request.param


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, code: int = errno.ENOSPC, onwards: bool = False):
    """Makes call number `nth` (and, `onwards`, every later one) of os.<name> fail; returns the list of calls."""
    real, calls = getattr(os, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth or (onwards and len(calls) > nth):
            raise OSError(code, os.strerror(code), "the-file")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    return calls


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_manifest_lists_sizes_and_hashes(tmp_path):
    write_folder(tmp_path / "model", "new")
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    data = (tmp_path / "model" / "weights.bin").read_bytes()
    assert manifest["format"] == 1
    assert set(manifest["files"]) == {"unet/config.json", "weights.bin"}
    assert manifest["files"]["weights.bin"] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert leftovers(tmp_path) == []


def test_commits_are_byte_identical(tmp_path):
    for name in "ab":
        write_folder(tmp_path / name, "same")
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (tmp_path / "b" / "manifest.json").read_bytes()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_block_leaves_nothing(tmp_path, error):
    write_folder(tmp_path / "model", "old")
    with pytest.raises(error), committed(tmp_path / "model", replace=True) as folder:
        (folder / "part").write_text("half")
        raise error
    assert text_of(tmp_path / "model") == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("way")
def test_existing_folder_is_refused_then_replaced(tmp_path):
    write_folder(tmp_path / "model", "old")
    with pytest.raises(UsageError, match="model: exists; use --force"):
        write_folder(tmp_path / "model", "new")
    assert text_of(tmp_path / "model") == "old"
    write_folder(tmp_path / "model", "new", replace=True)
    assert text_of(tmp_path / "model") == "new"
    assert leftovers(tmp_path) == []


def test_replace_spares_what_tinydiff_did_not_write(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="not a folder that tinydiff wrote"):
        write_folder(tmp_path / "photos", "new", replace=True)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"x"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("links", [True, False])
def test_what_somebody_put_into_a_folder_survives_its_replacement(tmp_path, monkeypatch, links):
    """Under its name; readers say of what is not hidden that it is no part of the folder."""
    if not links:
        fail_at(monkeypatch, "link", 1, code=errno.EPERM, onwards=True)
    model = tmp_path / "model"
    write_folder(model, "old")
    notes = {".git/objects/ab": "x", "unet/.notes": "y", "mine/.a/b": "z"}
    for name, text in notes.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)
    (model / ".link").symlink_to("nowhere")
    for text in ("new", "newer"):
        write_folder(model, text, replace=True)
        assert text_of(model) == text and os.readlink(model / ".link") == "nowhere"
        assert {name: (model / name).read_text() for name in notes} == notes
    (model / "README.md").write_text("mine")
    write_folder(model, "newest", replace=True)
    assert (model / "README.md").read_text() == "mine" and leftovers(tmp_path) == []
    with pytest.raises(ModelError, match=r"README\.md: not listed"):
        verify(model)


def test_a_file_system_without_modes_will_do(tmp_path, monkeypatch):
    def chmod(*_, **__) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", chmod)
    with committed(tmp_path / "model") as folder:
        (folder / "a").touch(mode=0o600)
    verify(tmp_path / "model")


@pytest.mark.parametrize("onwards", [False, True])
@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir", "unlink", "rmdir"])
def test_every_failing_call_keeps_old_or_new(tmp_path, way, name, onwards):
    for nth in count(1):
        base = tmp_path / str(nth)
        base.mkdir()
        write_folder(base / "model", "old")
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, name, nth, onwards=onwards)
            if failed := _raises_resource_error(lambda path=base / "model": write_folder(path, "new", replace=True)):
                assert "the-file: No space left on device; free some space" in failed
        assert text_of(base / "model") in ("old", "new")
        assert name in ("unlink", "rmdir") or not [left for left in leftovers(base) if left.startswith(".tmp-")]
        if len(calls) < nth:
            assert not failed and text_of(base / "model") == "new"
            assert nth > 2 or (name, way) == ("rename", "exchange") or name in ("unlink", "rmdir")
            break
        write_folder(base / "model", "next", replace=True)
        assert text_of(base / "model") == "next" and leftovers(base) == []


def _raises_resource_error(action) -> str:
    try:
        action()
    except ResourceError as error:
        assert error.code == 7
        return str(error)
    return ""


KILLER = """
import os, sys
from pathlib import Path
from tinydiff import temporary
from tinydiff.files import committed, present, read_json
from tinydiff.verified import verify
base, name = Path(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "renames":
    temporary.exchange = lambda *_: False
def write(path, text):
    with committed(path, replace=True) as folder:
        (folder / "a.json").write_text('{"text": "%s"}' % text)
for nth in range(1, 100):
    path = base / str(nth) / "model"
    write(path, "old")
    child = os.fork()
    if child == 0:
        owner = temporary if name == "exchange" else os
        real, calls = getattr(owner, name), []
        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == nth:
                os._exit(9)
            return real(*args, **kwargs)
        setattr(owner, name, dying)
        write(path, "new")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    verify(path)
    print(status, read_json(present(path) / "a.json")["text"] + " beside" * (not path.exists()))
    write(path, "next")
    verify(path)
    assert os.listdir(path.parent) == ["model"], os.listdir(path.parent)
    if status == 0:
        break
"""


@pytest.mark.parametrize("name", ["open", "fsync", "rename", "exchange", "mkdir", "unlink", "rmdir"])
@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_killed_before_every_call_keeps_old_or_new(tmp_path, name, how):
    """Readers, who change nothing, find one of them, and the next writer leaves nothing else."""
    command = [sys.executable, "-c", KILLER, str(tmp_path), name, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.split("\n")[:-1]
    assert lines[-1] == "0 new"
    assert len(lines) > 2 or name in ("rename", "exchange", "mkdir", "unlink", "rmdir")
    assert ("9 old beside" in lines) == ((how, name) == ("renames", "rename"))  # killed between the two
    assert set(lines[:-1]) <= {"9 old", "9 new", "9 old beside"}


FULL = """
import resource, sys
from pathlib import Path
from tinydiff.errors import ResourceError
from tinydiff.files import committed, write_file
from tinydiff.verified import verify
base = Path(sys.argv[1])
with committed(base / "model") as folder:
    (folder / "old").write_text("x")
write_file(base / "a.png", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for action in (lambda: write_file(base / "a.png", bytes(5000), force=True), lambda: replace()):
    def replace():
        with committed(base / "model", replace=True) as folder:
            (folder / "weights").write_bytes(bytes(5000))
    try:
        action()
    except ResourceError as error:
        print(error)
verify(base / "model")
print(sorted(path.name for path in base.rglob("*")), (base / "a.png").read_bytes())
"""


def test_file_size_limit_is_a_clean_refusal(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    *errors, names = done.stdout.splitlines()
    assert [error.split(": ", 1)[1] for error in errors] == ["File too large; raise the file size limit"] * 2
    assert names == "['a.png', 'manifest.json', 'model', 'old'] b'old'"


def test_broken_pipe_is_passed_on(tmp_path):
    with pytest.raises(BrokenPipeError), committed(tmp_path / "model"):
        raise BrokenPipeError


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "weights.bin", 100), "weights.bin: damaged, 100 bytes where 3000"),
    "emptied": (lambda f: os.truncate(f / "weights.bin", 0), "weights.bin: damaged, 0 bytes"),
    "flipped": (lambda f: flip_bit(f / "weights.bin", 1500), "weights.bin: damaged, its SHA-256"),
    "missing": (lambda f: (f / "weights.bin").unlink(), "weights.bin: missing"),
    "extra": (lambda f: (f / "unet" / "evil.py").write_text("1"), "evil.py: not listed"),
    "linked": (
        lambda f: ((f / "weights.bin").rename(f.parent / "w"), (f / "weights.bin").symlink_to(f.parent / "w")),
        "weights.bin: is a link",
    ),
    "pointer": (
        lambda f: (f / "weights.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "weights.bin: a Git LFS pointer",
    ),
    "fifo": (lambda f: ((f / "weights.bin").unlink(), os.mkfifo(f / "weights.bin")), "weights.bin: missing"),
    "manifest cut": (lambda f: os.truncate(f / "manifest.json", 20), "manifest.json: damaged, not valid JSON"),
    "manifest flipped": (lambda f: flip_bit(f / "manifest.json", 5), "manifest.json: damaged manifest"),
    "manifest fifo": (
        lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")),
        "manifest.json: not a regular file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_the_damaged_file(tmp_path, kind):
    write_folder(tmp_path / "model", "abc")
    damage, message = DAMAGE[kind]
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as caught:
        verify(tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/hosts", "", ".", "a/../../x", "a\0b"])
def test_verify_refuses_paths_that_lead_out(tmp_path, name):
    (tmp_path / "model").mkdir()
    entry = {name: {"size": 1, "sha256": "0" * 64}}
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"format": 1, "files": entry}))
    with pytest.raises(ModelError, match="leads out of the folder"):
        verify(tmp_path / "model")


def test_verify_refuses_a_link_in_the_middle_of_a_path(tmp_path):
    write_folder(tmp_path / "model", "abc")
    (tmp_path / "model" / "unet").rename(tmp_path / "elsewhere")
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="is a link"):
        verify(tmp_path / "model")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({"format": 2, "files": {}}, "written by a newer tinydiff"),
        ({"format": 1}, "damaged manifest"),
        ({"format": 1, "files": {"a": {"size": "1", "sha256": "x"}}}, "damaged manifest"),
        ({"format": 1, "files": {"a": {"size": True, "sha256": "x"}}}, "damaged manifest"),
        ({"format": 1, "files": {"a": 3}}, "damaged manifest"),
        ([], "holds no JSON object"),
    ],
)
def test_verify_refuses_odd_manifests(tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=message):
        verify(tmp_path)


def test_verify_folder_without_manifest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    verify(tmp_path)
    (tmp_path / "w.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"w\.safetensors: a Git LFS pointer"):
        verify(tmp_path)
    with pytest.raises(ModelError, match="absent: no such folder"):
        verify(tmp_path / "absent")


def test_verify_works_through_a_linked_folder_and_ignores_hidden_files(tmp_path):
    write_folder(tmp_path / "model", "abc")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "model" / ".DS_Store").write_text("x")
    verify(tmp_path / "link")


def test_files_are_as_readable_as_their_folder(tmp_path):
    with committed(tmp_path / "model") as folder:
        (folder / "weights").write_text("x")
        (folder / "weights").chmod(0o600)
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "model" / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_file(tmp_path):
    path = tmp_path / "out" / "a.png"
    write_file(path, b"one")
    with pytest.raises(UsageError, match=r"a\.png: exists; use --force"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    write_file(path, b"two", force=True)
    assert path.read_bytes() == b"two"
    assert leftovers(path.parent) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["fsync", "rename", "link", "open"])
def test_failing_write_file_keeps_the_old(tmp_path, name, force):
    for nth in count(1):
        path = tmp_path / f"{nth}.png"
        if force:
            path.write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, name, nth)
            failed = _raises_resource_error(lambda path=path: write_file(path, b"new", force=force))
        assert not path.exists() or path.read_bytes() in (b"old", b"new")
        assert not force or path.exists()
        assert leftovers(tmp_path) == []
        if not failed:
            assert path.read_bytes() == b"new"
            break


def test_write_file_without_hard_links(tmp_path, monkeypatch):
    fail_at(monkeypatch, "link", 1, code=errno.EPERM)
    write_file(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
    assert leftovers(tmp_path) == []


def test_write_file_loses_a_race_cleanly(tmp_path, monkeypatch):
    real = os.link

    def rival(source, target):
        Path(target).write_bytes(b"rival")
        real(source, target)

    monkeypatch.setattr(os, "link", rival)
    with pytest.raises(UsageError, match="exists"):
        write_file(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_bytes() == b"rival"
    assert leftovers(tmp_path) == []


def test_refusals_of_the_system_name_file_and_fix(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="file: File exists; remove what is there, or choose another path"):
        write_file(tmp_path / "file" / "a", b"x")
    with pytest.raises(ResourceError, match="file"), committed(tmp_path / "file" / "model"):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"nul"])
def test_read_json_refuses_garbage(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.json: damaged, not valid JSON"):
        read_json(tmp_path / "a.json")


def test_read_json_refuses_missing_folder_and_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in {"absent": "No such file", "": "not a regular file", "pipe": "not a regular file"}.items():
        with pytest.raises(ModelError, match=message):
            read_json(tmp_path / path)


HOLDER = """
import sys
from tinydiff.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_names_the_holder_and_outlives_no_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"in use by process {holder.pid};"), lock(tmp_path / "run"):
            pass
        holder.kill()
    with lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"
    with lock(tmp_path / "run"):
        pass


def swap(path: Path, text: str, how: str) -> None:
    """Replace a folder as this program does, or as somebody does who moves two folders."""
    if how != "moved":
        return write_folder(path, text, replace=True)
    write_folder(path.with_name("next"), text)
    path.rename(path.with_name("before"))
    path.with_name("next").rename(path)
    shutil.rmtree(path.with_name("before"))


def read_all(path: Path) -> tuple[str, str]:
    """What somebody does who opens a model: verify it, then read its files."""
    with undisturbed({path: stamp(path)}):
        verify(path)
        return read_json(path / "unet" / "config.json")["text"], (path / "weights.bin").read_text()[:3]


@pytest.mark.parametrize("how", ["exchange", "renames", "moved"])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_folder_that_is_replaced_at_any_moment_is_read_as_old_or_new(tmp_path, monkeypatch, how, manifest):
    """Before each file that a reader opens: never a mixture, and never called damaged or missing."""
    if how != "exchange":
        monkeypatch.setattr(temporary, "exchange", lambda *_: False)
    real, seen = io.open, set()
    for nth in count(1):
        path, opened = tmp_path / str(nth) / "model", []
        path.parent.mkdir()
        write_folder(path, "old")
        if not manifest:
            (path / "manifest.json").unlink()

        def opening(file, *args, nth=nth, path=path, opened=opened, **kwargs):
            if path in Path(file).parents or path == Path(file):
                opened.append(file)
            if len(opened) == nth:
                opened.append("swapped")
                swap(path, "new", how if manifest else "moved")
                if not manifest:
                    (path / "manifest.json").unlink()
            return real(file, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(io, "open", opening)
            patch.setattr("builtins.open", opening)
            found = again(lambda path=path: read_all(path))
        assert found in (("old", "old"), ("new", "new")), (nth, found)
        seen.add(found[0])
        if len(opened) < nth:
            break
    assert seen == {"old", "new"} and nth > 3


def test_a_folder_that_an_equal_one_replaces_is_replaced(tmp_path):
    """Else what is missing for a moment would be called missing."""
    write_folder(tmp_path / "model", "same")
    with pytest.raises(BusyError), undisturbed({tmp_path / "model": stamp(tmp_path / "model")}):
        write_folder(tmp_path / "model", "same", replace=True)


def test_who_never_finds_it_at_rest_is_told_so(tmp_path):
    write_folder(tmp_path / "model", "0")
    numbers = count(1)

    def read() -> None:
        with undisturbed({tmp_path / "model": stamp(tmp_path / "model")}):
            write_folder(tmp_path / "model", str(next(numbers)), replace=True)

    with pytest.raises(BusyError, match="model: replaced while it was read; wait") as caught:
        again(read)
    assert caught.value.code == 6 and next(numbers) > 10


def test_an_error_of_a_folder_at_rest_is_its_own(tmp_path):
    write_folder(tmp_path / "model", "0")
    with pytest.raises(KeyError), undisturbed({tmp_path / "model": stamp(tmp_path / "model")}):
        raise KeyError
    (tmp_path / "model" / ".DS_Store").write_text("x")  # which is nobody's replacement
    assert read_all(tmp_path / "model") == ("0", "000")


def test_an_old_folder_that_goes_while_it_is_found_is_looked_for_again(tmp_path, monkeypatch):
    """Its replacement ends between the search and the reading."""
    write_folder(tmp_path / "model", "new")
    old, model = tmp_path / ".tinydiff-old-model", tmp_path / "model"
    found = iter([old, old, model])
    monkeypatch.setattr(verified, "present", lambda _: next(found))
    shutil.copytree(model, old)
    (old / "weights.bin").unlink()  # half removed, and then gone
    real = files.stamp
    monkeypatch.setattr(verified, "stamp", lambda path: (real(path), shutil.rmtree(old, ignore_errors=True))[0])
    verify(model)
    assert next(found, None) is None


def test_a_folder_that_is_nowhere_for_a_moment_is_looked_for_again(tmp_path, monkeypatch):
    """The second of two renames comes after a reader has found nothing."""
    write_folder(tmp_path / "next", "new")
    looks, real = count(), files.present

    def late(path):
        if next(looks) == 1:
            (tmp_path / "next").rename(tmp_path / "model")
        return real(path)

    for module in (files, verified):
        monkeypatch.setattr(module, "present", late)
    verify(tmp_path / "model")
    assert next(looks) == 3


def test_readers_change_nothing_where_a_replacement_was_interrupted(tmp_path):
    """On a file system that cannot exchange names: the old folder is beside its place."""
    write_folder(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".tinydiff-old-model")
    verify(tmp_path / "model")
    assert present(tmp_path / "model") == tmp_path / ".tinydiff-old-model"
    assert [path.name for path in tmp_path.iterdir()] == [".tinydiff-old-model"]
    with pytest.raises(UsageError, match="exists"):
        write_folder(tmp_path / "model", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and text_of(tmp_path / "model") == "old"
