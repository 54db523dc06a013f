"""Folders have one writer at a time, and their files are exchanged in one step."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from engram_hf import claiming_engram, saving_engram
from engram_hf.claimed_saving_engram import ClaimedFolderWriter
from engram_hf.claiming_engram import LOCK_NAME, FolderClaim, FolderInUseError
from engram_hf.saving_engram import FolderWriter, require_settled

pytestmark = pytest.mark.any_version

OLD = {"config.json": b"old", "weights": b"old weights", "stale": b"old", "mine": b"mine"}
NEW = {"config.json": b"new", "weights": b"new weights", "sub/code.py": b"new", "manifest": b"new"}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# One is the exchange of the code saved beside a model, the other that of this package.
WRITERS = [FolderWriter, ClaimedFolderWriter]


def save(folder: Path, files: dict[str, bytes] = NEW, writer_class: type[FolderWriter] = ClaimedFolderWriter) -> None:
    with writer_class(folder) as writer:
        fill(writer.path, files)
        writer.publish(lambda name: name == "stale", last="manifest")


AFTER = {name: data for name, data in (OLD | NEW).items() if name != "stale"}


# --- claims


def test_claim_names_the_process_that_writes(tmp_path):
    with FolderClaim(tmp_path / "new"):
        before = contents(tmp_path)
        with pytest.raises(FolderInUseError, match=rf"being written by process {os.getpid()} on .* \(since 20"):
            FolderClaim(tmp_path / "new").take()
        assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()  # The claim is made without a later write.
    with FolderClaim(tmp_path / "new"):
        (tmp_path / "new" / "a").write_bytes(b"a")
    assert contents(tmp_path) == {"new/a": b"a"}


def claim_and_write(folder, barrier, results):
    """Do what a conversion does: only one process may be between the claim and its release."""
    barrier.wait()
    try:
        with FolderClaim(folder):
            os.close(os.open(folder / "only one", os.O_CREAT | os.O_EXCL))
            time.sleep(0.02)
            os.unlink(folder / "only one")
            results.put("wrote")
    except FolderInUseError:
        results.put("refused")
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("has_locks", [True, False])
def test_only_one_of_several_processes_claims_a_folder(tmp_path, has_locks, monkeypatch):
    """One of them writes; the others are refused, or write after it."""
    if not has_locks:
        monkeypatch.setattr(claiming_engram, "lock_file", lambda file: None)
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        barrier, results = context.Barrier(4), context.Queue()
        arguments = (tmp_path / str(attempt), barrier, results)
        processes = [context.Process(target=claim_and_write, args=arguments) for _ in range(4)]
        for process in processes:
            process.start()
        answers = [results.get(timeout=60) for _ in processes]
        for process in processes:
            process.join()
        assert set(answers) <= {"wrote", "refused"} and "wrote" in answers, answers
        assert contents(tmp_path) == {}


def claim_and_die(folder):
    FolderClaim(folder).take()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("has_locks", [True, False])
def test_claim_of_a_killed_process_is_taken_over(tmp_path, has_locks, monkeypatch):
    if not has_locks:
        monkeypatch.setattr(claiming_engram, "lock_file", lambda file: None)
    process = multiprocessing.get_context("fork").Process(target=claim_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / LOCK_NAME).exists()
    with FolderClaim(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert contents(tmp_path) == {}


def test_claim_of_another_machine_is_respected_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(claiming_engram, "lock_file", lambda file: None)
    (tmp_path / LOCK_NAME).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))
    with pytest.raises(FolderInUseError, match=r"process 1 on elsewhere \(since yesterday\); wait .* delete"):
        FolderClaim(tmp_path).take()
    (tmp_path / LOCK_NAME).write_text("torn")
    with pytest.raises(FolderInUseError, match="being written by another process"):
        FolderClaim(tmp_path).take()


def test_claim_of_an_unwritable_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="is a file; name a folder"):
        FolderClaim(tmp_path / "file").take()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match="choose a folder that is writable"):
        FolderClaim(tmp_path).take()


# --- exchanges


@pytest.mark.parametrize("old", [OLD, {}])
def test_exchange_adds_all_files_together(tmp_path, old):
    fill(tmp_path / "target", old)
    with ClaimedFolderWriter(tmp_path / "target") as writer:
        fill(writer.path, NEW)
        assert {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir() if path.is_file()} == old
        writer.publish(lambda name: name == "stale", last="manifest")
    assert contents(tmp_path / "target") == (AFTER if old else NEW)


def test_exchange_keeps_a_file_that_is_already_there(tmp_path):
    """A table does so if it is saved to the folder it was loaded from."""
    fill(tmp_path, OLD)
    inode = (tmp_path / "weights").stat().st_ino
    with ClaimedFolderWriter(tmp_path) as writer:
        os.link(tmp_path / "weights", writer.path / "weights")
        writer.publish()
    assert contents(tmp_path) == OLD and (tmp_path / "weights").stat().st_ino == inode


def test_exception_in_an_exchange_leaves_the_old_files(tmp_path):
    for target in (tmp_path / "old", tmp_path / "new"):
        if target.name == "old":
            fill(target, OLD)
        with pytest.raises(KeyboardInterrupt), ClaimedFolderWriter(target) as writer:
            fill(writer.path, NEW)
            raise KeyboardInterrupt
    assert contents(tmp_path) == {f"old/{name}": data for name, data in OLD.items()}
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("function", ["os.replace", "os.link", "pathlib.Path.unlink", "pathlib.Path.rename"])
def test_interrupted_exchange_is_completed(tmp_path, monkeypatch, function, has_links):
    """Before the decisive step the folder is the old one, after it the new one."""
    if not has_links:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links")

        monkeypatch.setattr(os, "link", refuse)
    module, _, name = function.rpartition(".")
    owner = os if module == "os" else Path
    real = getattr(owner, name)
    states = []
    for step in range(9):
        calls = []

        def interrupt(*arguments, calls=calls, step=step, **options):
            calls.append(arguments)
            if len(calls) == step + 1:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        target = tmp_path / str(step)
        fill(target, OLD)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            try:
                save(target)
                interrupted = False
            except KeyboardInterrupt:
                interrupted = True
        found = contents(target)
        found.pop(LOCK_NAME, None)  # Its removal was interrupted; the next claim takes it over.
        assert found in (OLD, AFTER), step
        states.append((interrupted, found == AFTER))
        save(target)
        assert contents(target) == AFTER
    assert (False, True) in states  # The last steps come after its end.
    assert function in ("pathlib.Path.unlink",) or not has_links or (True, True) in states


def save_and_die(folder, moment, writer_class):
    """Exit at the `moment`-th change of a name."""
    import sys

    events = []

    def count(event, _):
        if event in ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            events.append(event)
            if len(events) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(folder, writer_class=writer_class)


@pytest.mark.parametrize("writer_class", WRITERS)
def test_exchange_killed_at_every_step(tmp_path, monkeypatch, writer_class):
    """The folder is the old one, the new one, or is refused with the place of the new one; the next save cleans up."""
    monkeypatch.setattr(saving_engram, "LOAD_WAITS", 0.0)
    seen = set()
    for moment in range(1, 80):
        target = tmp_path / "target"
        fill(target, OLD)
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(target, moment, writer_class))
        process.start()
        process.join()
        found = {name: data for name, data in contents(target).items() if not name.startswith(".engram-")}
        try:
            require_settled(target)
            assert found in (OLD, AFTER), moment
            seen.add("old" if found == OLD else "new")
        except ValueError as error:
            whole = Path(str(error).split("whole in ")[1].split(":")[0])
            assert {name: data for name, data in contents(whole).items() if name in NEW} == NEW
            seen.add("refused")
        save(target, writer_class=writer_class)
        assert contents(target) == AFTER
        shutil.rmtree(target)
        if process.exitcode == 0:
            break
    else:
        pytest.fail("it never ended")
    assert seen == {"old", "new", "refused"}


@pytest.mark.parametrize("writer_class", WRITERS)
def test_second_save_keeps_the_files_of_a_running_one(tmp_path, writer_class):
    with writer_class(tmp_path) as first:
        fill(first.path, NEW)
        save(tmp_path, {"config.json": b"of the second"}, writer_class)
        first.publish()
    assert contents(tmp_path) == NEW


def save_often(folder, number, writer_class, barrier, results):
    files = {name: f"{number}".encode() * 9 for name in ("config.json", "weights", "manifest", f"only {number}")}
    try:
        for _ in range(20):
            barrier.wait()
            with writer_class(folder) as writer:
                fill(writer.path, files)
                writer.publish(lambda name: name.startswith("only"), last="manifest")
        results.put("saved")
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("writer_class", WRITERS)
def test_last_of_many_saves_wins_completely(tmp_path, writer_class):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = [(tmp_path / "new", number, writer_class, barrier, results) for number in range(3)]
    processes = [context.Process(target=save_often, args=some) for some in arguments]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["saved"] * 3
    found = contents(tmp_path / "new")
    assert len(found) == 4 and len(set(found.values())) == 1, found


def test_saves_work_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    fill(tmp_path, OLD)
    save(tmp_path)
    assert contents(tmp_path) == AFTER


def test_require_settled_waits_for_a_running_save(tmp_path, monkeypatch):
    import threading

    (tmp_path / ".engram-exchange-0").mkdir()
    threading.Timer(0.2, (tmp_path / ".engram-exchange-0").rmdir).start()
    require_settled(tmp_path)
    require_settled("a/repository")
    (tmp_path / ".engram-exchange-0").mkdir()
    monkeypatch.setattr(saving_engram, "LOAD_WAITS", 0.0)
    with pytest.raises(ValueError, match=r"may be mixed .* load it from there"):
        require_settled(tmp_path)
