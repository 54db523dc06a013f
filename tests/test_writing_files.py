"""Files are complete or absent, with any concurrent writer and any file system."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child_processes import forks_of_a_server
from safetensors import safe_open

from engram_hf import safetensors_engram
from engram_hf.safetensors_engram import (
    FileFormatError,
    FileWriter,
    can_link,
    header_bytes,
    link_or_copy,
    read_header,
    still_names,
    write_json,
)

pytestmark = pytest.mark.any_version

HEAD = header_bytes([("a", "U8", (64,))])


def write(path: Path, content: bytes = 64 * b"a") -> None:
    with FileWriter(path, HEAD) as writer:
        writer.write_at(len(HEAD), memoryview(content))


def test_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "a"
    with FileWriter(path, HEAD) as writer:
        writer.write_at(len(HEAD), memoryview(64 * b"a"))
        assert not path.exists()
    with safe_open(path, "np") as file:
        assert file.get_tensor("a").tobytes() == 64 * b"a"
    assert read_header(path).head == HEAD
    with pytest.raises(KeyboardInterrupt), FileWriter(path, HEAD) as writer:
        writer.write_at(len(HEAD), memoryview(64 * b"b"))
        raise KeyboardInterrupt
    assert path.read_bytes() == HEAD + 64 * b"a"
    assert list(tmp_path.iterdir()) == [path]


def refuse_locks(monkeypatch) -> None:
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("has_locks", [True, False])
def test_last_complete_file_wins(tmp_path, monkeypatch, has_locks):
    """No writer touches another writer's file: every rank of a job may save to one folder."""
    if not has_locks:
        refuse_locks(monkeypatch)
    path = tmp_path / "a"
    with FileWriter(path, HEAD) as first:
        with FileWriter(path, HEAD) as second:
            first.write_at(len(HEAD), memoryview(64 * b"1"))
            second.write_at(len(HEAD), memoryview(64 * b"2"))
            assert len(list(tmp_path.iterdir())) == 2
        assert path.read_bytes() == HEAD + 64 * b"2"
    assert path.read_bytes() == HEAD + 64 * b"1"
    assert list(tmp_path.iterdir()) == [path]


def write_many_times(folder: Path) -> None:
    for _ in range(60):
        write(folder / "a")
        write_json(folder / "a.json", {"a": 1})


def test_concurrent_processes_write_one_complete_file(tmp_path):
    context = forks_of_a_server()
    processes = [context.Process(target=write_many_times, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert read_header(tmp_path / "a").head == HEAD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.json"]


def test_write_on_a_file_system_that_locks_only_writable_files(tmp_path, monkeypatch):
    """NFS behaves so."""
    lock, asked = fcntl.flock, []

    def lock_writers(file, operation):
        asked.append(file)
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_writers)
    (tmp_path / "a.0.unfinished").write_bytes(b"half")
    with FileWriter(tmp_path / "a", HEAD) as first:
        with FileWriter(tmp_path / "a", HEAD):
            assert len(list(tmp_path.iterdir())) == 2  # The remains are gone; the file that is being written is not.
        first.write_at(len(HEAD), memoryview(64 * b"1"))
    assert asked and [file.name for file in tmp_path.iterdir()] == ["a"]


def test_writer_removes_the_remains_of_a_killed_writer(tmp_path, monkeypatch):
    """The remains may be a link to a file of another folder, which a live writer would rename at once."""
    (tmp_path / "source").write_bytes(b"rows of another model")
    path, left = tmp_path / "a", tmp_path / "a.0123.unfinished"
    opened = os.listdir("/proc/self/fd")
    for make, is_link in (
        (lambda: left.write_bytes(b"half"), False),
        (lambda: os.link(tmp_path / "source", left), True),
        (lambda: left.symlink_to(tmp_path / "source"), True),
        (lambda: left.symlink_to(tmp_path / "nowhere"), True),
        (lambda: os.mkfifo(left), True),
    ):
        make()
        write(path)
        assert os.path.lexists(left) == is_link
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_engram, "_LINK_SECONDS", -1)
            write(path)
        assert path.read_bytes() == HEAD + 64 * b"a"
        assert (tmp_path / "source").read_bytes() == b"rows of another model"
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "source"]
    assert len(os.listdir("/proc/self/fd")) == len(opened)


def test_writer_keeps_unfinished_files_on_systems_without_locks(tmp_path, monkeypatch):
    refuse_locks(monkeypatch)
    (tmp_path / "a.0.unfinished").write_bytes(b"half")
    write(tmp_path / "a")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "a.0.unfinished"]


def test_full_disk_and_read_only_folder_are_reported(tmp_path):
    """A separate process limits the size of its files, and drops its right to write everywhere."""
    script = f"""
import os, resource
from pathlib import Path
from engram_hf import safetensors_engram
from engram_hf.safetensors_engram import FileWriter, header_bytes, link_or_copy
folder, head = Path({str(tmp_path)!r}), header_bytes([("a", "U8", (9000,))])
source = os.open(folder / "source", os.O_RDONLY)
os.remove(folder / "source")  # not to be linked, so that it is copied
def attempt(action):
    try:
        action()
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
attempt(lambda: FileWriter(folder / "full", head))
attempt(lambda: link_or_copy(source, folder / "source", folder / "copy"))
os.chmod(folder, 0o555)
if os.geteuid() == 0:
    os.setuid(65534)
attempt(lambda: FileWriter(folder / "locked", head))
attempt(lambda: link_or_copy(source, folder / "source", folder / "locked"))
"""
    (tmp_path / "source").write_bytes(9000 * b"a")
    tmp_path.chmod(0o755)
    try:
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    finally:
        tmp_path.chmod(0o755)
    lines = run.stdout.splitlines()
    assert len(lines) == 4, run.stderr
    assert all("do not fit there; free space" in line for line in lines[:2])
    assert all("cannot be written (Permission denied)" in line for line in lines[2:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["pwrite", "copy_file_range"])
def test_disk_that_fills_up_while_writing_is_reported(tmp_path, monkeypatch, way):
    """Not every file system reserves the space that is requested at the beginning."""

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "source").write_bytes(HEAD + 64 * b"a")
    span = read_header(tmp_path / "source").tensors["a"]
    source = os.open(tmp_path / "source", os.O_RDONLY)
    with pytest.raises(OSError, match="do not fit there; free space"), FileWriter(tmp_path / "a", HEAD) as writer:
        monkeypatch.setattr(os, way, fill)
        if way == "pwrite":
            writer.write_at(len(HEAD), memoryview(64 * b"a"))
        else:
            writer.copy("a", span, source)
    os.close(source)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_link_or_copy_makes_one_file_of_two_names(tmp_path):
    (tmp_path / "a").write_bytes(b"rows" * 9999)
    source = os.open(tmp_path / "a", os.O_RDONLY)
    assert can_link(source, tmp_path / "a", tmp_path)
    link_or_copy(source, tmp_path / "a", tmp_path / "b")
    link_or_copy(source, tmp_path / "a", tmp_path / "b")  # The target exists already.
    assert (tmp_path / "b").samefile(tmp_path / "a")
    link_or_copy(source, tmp_path / "a", tmp_path / "a")  # The target is the source.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    # Another file took the name: the opened file is copied, not the present one.
    os.replace(tmp_path / "b", tmp_path / "kept")
    (tmp_path / "a").unlink()
    (tmp_path / "a").write_bytes(b"other")
    assert not can_link(source, tmp_path / "a", tmp_path)
    link_or_copy(source, tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"rows" * 9999
    assert not (tmp_path / "c").samefile(tmp_path / "kept")
    os.close(source)


def share_blocks(monkeypatch) -> list[int]:
    """Make the file system appear to share blocks; return the calls that asked for it."""
    asked = []

    def ioctl(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        asked.append(source)
        os.pwrite(target, os.pread(source, os.fstat(source).st_size, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


def test_link_or_copy_shares_blocks_where_possible(tmp_path, monkeypatch):
    """Both files can be written to then."""
    (tmp_path / "a").write_bytes(b"rows" * 9999)
    source = os.open(tmp_path / "a", os.O_RDONLY)
    asked = share_blocks(monkeypatch)
    assert can_link(source, tmp_path / "a", tmp_path)
    link_or_copy(source, tmp_path / "a", tmp_path / "b")
    os.close(source)
    assert asked == [source, source]
    assert not (tmp_path / "b").samefile(tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == b"rows" * 9999
    assert all((tmp_path / name).stat().st_mode & 0o200 for name in "ab")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_link_or_copy_makes_links_read_only(tmp_path):
    """It does so under both names; a user who may not change the rights gets a copy."""
    (tmp_path / "a").write_bytes(b"rows")
    (tmp_path / "a").chmod(0o640)
    source = os.open(tmp_path / "a", os.O_RDONLY)
    assert can_link(source, tmp_path / "a", tmp_path)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640  # Nothing was linked yet.
    link_or_copy(source, tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o440
    os.close(source)


def test_link_or_copy_copies_what_cannot_be_made_read_only(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a").write_bytes(b"rows")
    source = os.open(tmp_path / "a", os.O_RDONLY)
    monkeypatch.setattr(os, "chmod", refuse)
    link_or_copy(source, tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").samefile(tmp_path / "a") and (tmp_path / "b").read_bytes() == b"rows"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    os.close(source)


@pytest.mark.parametrize("code", ["EXDEV", "EPERM", "EMLINK", "ENOTSUP", "ENOSYS", "ENOENT", "EACCES"])
def test_link_or_copy_copies_where_hard_links_fail(tmp_path, monkeypatch, code):
    """Reasons: one disk mounted twice, no links, too many links, a deleted file, or another user's file."""

    def refuse(*_):
        raise OSError(getattr(errno, code), "no link")

    (tmp_path / "a").write_bytes(b"rows")
    source = os.open(tmp_path / "a", os.O_RDONLY)
    monkeypatch.setattr(os, "link", refuse)
    assert not can_link(source, tmp_path / "a", tmp_path)
    link_or_copy(source, tmp_path / "a", tmp_path / "b", symbolic=True)
    assert (tmp_path / "b").is_symlink() and (tmp_path / "b").samefile(tmp_path / "a")
    link_or_copy(source, tmp_path / "a", tmp_path / "c")
    assert not (tmp_path / "c").samefile(tmp_path / "a") and (tmp_path / "c").read_bytes() == b"rows"
    link_or_copy(source, tmp_path / "a", tmp_path / "a", symbolic=True)  # The target is the source.
    assert still_names(tmp_path / "a", source) and not (tmp_path / "a").is_symlink()
    os.close(source)


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_tensor_is_copied_out_of_a_file(tmp_path, monkeypatch, kernel_copies):
    """Only the tensor's bytes are copied; the kernel cannot do it between all file systems."""
    if not kernel_copies:

        def refuse(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    tensors = [("a", "U8", (10,)), ("b", "U8", (64,)), ("c", "U8", (10,))]
    head = header_bytes(tensors)
    (tmp_path / "source").write_bytes(head + 10 * b"a" + 64 * b"b" + 10 * b"c")
    span = read_header(tmp_path / "source").tensors["b"]
    source = os.open(tmp_path / "source", os.O_RDONLY)
    with FileWriter(tmp_path / "target", head) as writer:
        writer.copy("b", span, source)
    assert (tmp_path / "target").read_bytes() == head + bytes(10) + 64 * b"b" + bytes(10)
    os.truncate(tmp_path / "source", len(head) + 20)
    with pytest.raises(FileFormatError, match="became shorter"), FileWriter(tmp_path / "cut", head) as writer:
        writer.copy("b", span, source)
    assert not (tmp_path / "cut").exists()
    os.close(source)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("EIO", r"^\[Errno 5\] no link$"),
        ("EROFS", "cannot be written .*choose a folder that is writable"),
        ("ENOSPC", "do not fit there; free space"),
        ("EDQUOT", "do not fit there; free space"),
    ],
)
def test_link_errors_name_the_file(tmp_path, monkeypatch, code, said):
    def fail(*_):
        raise OSError(getattr(errno, code), "no link")

    (tmp_path / "a").write_bytes(b"rows")
    source = os.open(tmp_path / "a", os.O_RDONLY)
    monkeypatch.setattr(os, "link", fail)
    for action in (can_link, link_or_copy):
        with pytest.raises(OSError, match=said):
            action(source, tmp_path / "a", tmp_path / "b")
    os.close(source)


def test_link_that_cannot_be_renamed_is_removed(tmp_path):
    (tmp_path / "a").write_bytes(b"rows")
    (tmp_path / "folder").mkdir()
    source = os.open(tmp_path / "a", os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        link_or_copy(source, tmp_path / "a", tmp_path / "folder")
    os.close(source)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "folder"]


def test_small_json_file_is_replaced_atomically(tmp_path):
    write_json(tmp_path / "a.json", {"é": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
