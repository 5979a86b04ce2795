"Checkpoints when the power goes, a process is killed, the disk is full, a rank fails or another run comes in between; on one process, on threads that play ranks, and on real processes."
import ctypes
import errno
import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from llm_scratch import checkpointing, core
from llm_scratch.checkpointing import (
    AsyncSaver, agree_over, best_interval, check_same, clear_leftovers, committed, inventory, keep_last, keep_last_and_every, latest, power_cuts, run_lock, saved, snapshot)
from llm_scratch.core import UserError

LIMIT = 120  # seconds after which a child counts as hanging
HIDDEN = {".save.lock", ".run.lock"}  # may always be there


def save(folder, step, *, size=8, **how):
    with committed(folder, step, **how) as new:
        (new/"a.bin").write_bytes(bytes([step % 256])*size)
        (new/"sub").mkdir()
        (new/"sub"/"b.txt").write_text(str(step))


def names(folder): return sorted(p.name for p in Path(folder).iterdir() if p.name not in HIDDEN)


def flip(f):
    data = bytearray(f.read_bytes()); data[len(data)//2] ^= 1; f.write_bytes(data)


def forked(work):
    "Run `work` in a fork, which is warm; the child never comes back into pytest."
    if pid := os.fork(): return pid
    torch.set_num_threads(1)  # the threads of the parent do not come along, and a child that waits for them hangs
    signal.alarm(2*LIMIT)  # whatever happens to the parent
    try: work(); os._exit(0)
    except BaseException: import traceback; traceback.print_exc(); os._exit(1)


def ended(pid, limit=LIMIT):
    "The exit status of a child; it is killed when it hangs."
    for _ in range(int(limit/.02)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.02)
    os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    raise AssertionError(f"a child hung for {limit} seconds")


def kill(pid): os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)


def until(holds, limit=LIMIT):
    for _ in range(int(limit/.005)):
        if holds(): return
        time.sleep(.005)
    raise AssertionError("waited in vain")


class Threads:
    "As many ranks as wanted, each a thread; `agree` as a group of processes has it."
    def __init__(self, world): self.world, self.said, self.met = world, [""]*world, threading.Barrier(world, timeout=LIMIT)

    def agree(self, rank):
        def agree(wrong):
            self.said[rank] = wrong
            self.met.wait()
            first = next((f"rank {r}: {w}" for r, w in enumerate(self.said) if w), "")
            self.met.wait()
            return first
        return agree

    def run(self, work):
        "What `work(rank, agree)` returned or raised on each rank."
        out = [None]*self.world
        def one(rank):
            try: out[rank] = work(rank, self.agree(rank))
            except BaseException as e: out[rank] = e; self.met.abort() if not isinstance(e, (UserError, Oops)) else None
        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.world)]
        for t in threads: t.start()
        for t in threads: t.join(LIMIT)
        assert not any(t.is_alive() for t in threads)
        return out


class Oops(Exception): "A mistake in the code that writes."


# --- one process: whole or not at all -------------------------------------------------------------------------------

def test_a_checkpoint_appears_whole_with_every_file_in_its_manifest(tmp_path):
    with committed(tmp_path/"deep"/"run", 12) as new:
        assert new.is_dir() and latest(new.parent) is None
        (new/"x").write_bytes(b"1"); (new/"d"/"e").mkdir(parents=True); (new/"d"/"e"/"y").write_bytes(b"2")
        assert saved(new.parent) == {}
    path = latest(tmp_path/"deep"/"run")
    assert path.name == "000012" and names(path.parent) == ["000012", "latest"]
    assert set(json.loads((path/"manifest.json").read_text())["sha256"]) == {"x", "d/e/y"}
    assert (path.parent/"latest").read_text().strip() == "000012"  # what DeepSpeed's own loader reads, too


@pytest.mark.parametrize("e", [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"), RuntimeError("I/O error: No space left on device (os error 28)"), Oops("x"), KeyboardInterrupt()], ids=repr)
def test_a_failed_block_leaves_the_checkpoint_before(e, tmp_path):
    save(tmp_path, 1)
    with pytest.raises(BaseException) as got:
        with committed(tmp_path, 2) as new:
            (new/"x").write_bytes(b"1")
            raise e
    assert names(tmp_path) == ["000001", "latest"] and latest(tmp_path).name == "000001"
    if isinstance(e, KeyboardInterrupt): assert got.value is e
    else: assert isinstance(got.value, UserError) and got.value.__cause__ is e and "000002 was not saved: " in str(got.value) and "\n" not in str(got.value)
    assert ("full" in str(got.value)) == ("space" in str(e) or "quota" in str(e))


def test_nothing_written_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="nothing was written"):
        with committed(tmp_path, 1): pass
    assert names(tmp_path) == []


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 1); save(tmp_path, 2)
    with committed(tmp_path, 2) as new: (new/"other").write_text("x")
    assert sorted(p.name for p in latest(tmp_path).iterdir()) == ["manifest.json", "other"] and names(tmp_path) == ["000001", "000002", "latest"]


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path/"file").write_text("x")
    for attempt in (lambda: save(tmp_path/"file"/"run", 1), lambda: run_lock(tmp_path/"file"/"run").__enter__()):
        with pytest.raises(UserError, match="NotADirectoryError") as e: attempt()
        assert "\n" not in str(e.value)


# --- finding it again ------------------------------------------------------------------------------------------------

def test_no_folder_no_checkpoint(tmp_path):
    assert latest(tmp_path/"none") is None and saved(tmp_path/"none") == {}
    (tmp_path/"notes").mkdir(); (tmp_path/"000007").write_text("a file, no checkpoint")
    assert latest(tmp_path) is None


def test_saved_sorts_by_number(tmp_path):
    for step in (5, 1000000, 40, 999999): save(tmp_path, step, keep=keep_last(9))
    assert list(saved(tmp_path)) == [5, 40, 999999, 1000000] and latest(tmp_path).name == "999999"  # written last


@pytest.mark.parametrize("spoil, named", [
    (lambda f: flip(f/"000003"/"a.bin"), "a.bin is corrupt"), (lambda f: flip(f/"000003"/"sub"/"b.txt"), "b.txt is corrupt"), (lambda f: (f/"000003"/"sub"/"b.txt").unlink(), "b.txt is missing"),
    (lambda f: (f/"000003"/"manifest.json").unlink(), "manifest.json is missing"), (lambda f: (f/"000003"/"manifest.json").write_text("{"), "manifest.json is not JSON"),
    (lambda f: (f/"000003"/"manifest.json").write_text('{"format": "llm_scratch model", "sha256": {"a.bin": ""}}'), "not of llm_scratch checkpoint"),
    (lambda f: shutil.rmtree(f/"000003"), "latest names no checkpoint")])
def test_a_damaged_checkpoint_is_passed_over_and_told(spoil, named, tmp_path):
    for step in (1, 2, 3): save(tmp_path, step, keep=keep_last(3))
    spoil(tmp_path)
    with pytest.warns(UserWarning, match=named) as said: assert latest(tmp_path).name == "000002"
    assert len(said) == 1 and "Going on from" in str(said[0].message) and "\n" not in str(said[0].message)
    flip(tmp_path/"000002"/"a.bin")
    with pytest.warns(UserWarning, match=named): assert latest(tmp_path).name == "000001"
    flip(tmp_path/"000001"/"a.bin")
    with pytest.raises(UserError, match="no checkpoint in .* is whole .*: move the folder away"): latest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"000009\n", b"../000001", b"nonsense", b"\xff\xfe", b"\x00"*6, "\u0663".encode(), None])
def test_a_damaged_pointer_is_passed_over_and_told(content, tmp_path):
    save(tmp_path, 1); save(tmp_path, 2)
    if content is None: (tmp_path/"latest").unlink()
    else: (tmp_path/"latest").write_bytes(content)
    with pytest.warns(UserWarning, match="latest names no checkpoint"): assert latest(tmp_path).name == "000002"


def test_a_good_pointer_is_obeyed_without_a_word(tmp_path, recwarn):
    save(tmp_path, 1); save(tmp_path, 2)
    (tmp_path/"latest").write_text("000001")  # the reader goes back
    assert latest(tmp_path).name == "000001" and not recwarn.list


# --- what stays ------------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(st.sets(st.integers(0, 60), min_size=1), st.integers(1, 5), st.integers(1, 9))
def test_which_steps_stay(steps, n, every):
    steps = sorted(steps)
    assert keep_last(n)(steps) == set(steps[-n:])
    assert keep_last_and_every(n, every)(steps) == set(steps[-n:]) | {s for s in steps if not s % every}


def test_nothing_to_keep_is_refused():
    for wrong in (lambda: keep_last(0), lambda: keep_last_and_every(0, 5)):
        with pytest.raises(ValueError, match="at least 1"): wrong()


def test_old_ones_go_and_the_reader_can_choose_which(tmp_path):
    for step in range(1, 8): save(tmp_path/"two", step); save(tmp_path/"some", step, keep=keep_last_and_every(1, 3)); save(tmp_path/"none", step, keep=lambda steps: set())
    assert list(saved(tmp_path/"two")) == [6, 7] and list(saved(tmp_path/"some")) == [3, 6, 7]
    assert list(saved(tmp_path/"none")) == [7]  # never the one just written


def test_after_going_back_the_given_up_future_is_left_alone_but_not_followed(tmp_path):
    for step in (2, 4, 6, 8): save(tmp_path, step, keep=keep_last(4))
    (tmp_path/"latest").write_text("000002")
    save(tmp_path, 3); save(tmp_path, 5)
    assert list(saved(tmp_path)) == [4, 5, 6, 8] and latest(tmp_path).name == "000005"


def test_a_kill_while_old_ones_are_deleted_leaves_no_half_checkpoint(tmp_path):
    for step in (1, 2): save(tmp_path, step)
    def half(path, **_):
        if path.suffix == ".saving": return
        (path/"a.bin").unlink()
        raise KeyboardInterrupt
    with patch.object(shutil, "rmtree", half), pytest.raises(KeyboardInterrupt): save(tmp_path, 3)
    assert list(saved(tmp_path)) == [2, 3] and latest(tmp_path).name == "000003"
    assert [what for _, _, what in inventory(tmp_path) if "damaged" in what] == []
    assert clear_leftovers(tmp_path) == [".000001.gone"] and names(tmp_path) == ["000002", "000003", "latest"]


# --- leftovers and locks ---------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:.*Going on from")
def test_a_checkpoint_that_is_replaced_is_never_lost_to_a_power_cut(tmp_path):
    "The only one there is: between the two renames it has no name, and clearing up gives it back."
    run = tmp_path/"run"
    save(run, 4)
    nameless = 0
    for i, (done, tree) in enumerate(power_cuts(run, lambda: save(run, 4, size=9))):
        folder = found(tree, tmp_path/str(i))
        nameless += not saved(folder)
        clear_leftovers(folder)
        assert len((latest(folder)/"a.bin").read_bytes()) in ((9,) if done else (8, 9))
    assert nameless


def test_leftovers_of_the_dead_go_and_what_was_being_replaced_comes_back(tmp_path):
    save(tmp_path, 1)
    (tmp_path/"000001").rename(tmp_path/".000001.77.old")  # killed between the two renames of a replacement
    for left in (".000005.saving", ".000005.88.new"): (tmp_path/left).mkdir(); (tmp_path/left/"a.bin").write_text("half")
    (tmp_path/".latest.88.new").write_text("0000"); (tmp_path/".mine").write_text("not theirs"); (tmp_path/"notes.new").write_text("not theirs")
    assert clear_leftovers(tmp_path) == [".000001.77.old", ".000005.88.new", ".000005.saving", ".latest.88.new"]
    assert names(tmp_path) == [".mine", "000001", "latest", "notes.new"] and latest(tmp_path).name == "000001"
    (tmp_path/".000001.99.old").mkdir()  # replaced, but not deleted any more
    assert clear_leftovers(tmp_path) == [".000001.99.old"] and (tmp_path/"000001"/"a.bin").is_file()


def test_a_living_save_is_left_alone_by_the_second_process_and_its_remains_go_when_it_is_dead(tmp_path):
    def hang():
        with committed(tmp_path, 4) as new: (new/"a.bin").write_text("x"); time.sleep(LIMIT)
    save(tmp_path, 2)
    child = forked(hang)
    try:
        until((tmp_path/".000004.saving"/"a.bin").exists)
        for second in (lambda: save(tmp_path, 4), lambda: save(tmp_path, 6), lambda: clear_leftovers(tmp_path)):
            with pytest.raises(UserError, match=f"is in use by process {child} on {socket.gethostname()}: wait until that ends") as e: second()
            assert "\n" not in str(e.value)
        assert (tmp_path/".000004.saving"/"a.bin").exists() and latest(tmp_path).name == "000002"
    finally: kill(child)
    assert ".000004.saving" in names(tmp_path)
    save(tmp_path, 6)
    assert names(tmp_path) == ["000002", "000006", "latest"]


def test_a_run_has_its_folder_for_itself_until_it_ends_or_dies(tmp_path):
    def hang():
        with run_lock(tmp_path/"run"): (tmp_path/"up").touch(); time.sleep(LIMIT)
    child = forked(hang)
    try:
        until((tmp_path/"up").exists)
        with pytest.raises(UserError, match=f"cannot run in .*run: .*run is in use by process {child} "):
            with run_lock(tmp_path/"run"): pass
        save(tmp_path/"run", 1)  # another lock
    finally: kill(child)
    for _ in range(2):
        with run_lock(tmp_path/"run"): pass


def test_the_lock_outlives_rank_0_as_long_as_another_rank_lives(tmp_path):
    "A rank that still writes must not meet the next run."
    group = Threads(2)
    def work(rank, agree):
        with run_lock(tmp_path, rank=rank, agree=agree):
            if rank: go.wait(LIMIT); return
        with pytest.raises(UserError, match="is in use by process"):
            with run_lock(tmp_path): pass
        go.set()
    go = threading.Event()
    assert group.run(work) == [None, None]
    with run_lock(tmp_path): pass


def test_a_rank_that_still_writes_after_the_death_of_rank_0_keeps_the_next_save_out(tmp_path):
    def hang():
        with committed(tmp_path, 4, rank=1): (tmp_path/"up").touch(); time.sleep(LIMIT)
    save(tmp_path, 2)
    (tmp_path/".000004.saving").mkdir()  # by rank 0, which is dead
    child = forked(hang)
    try:
        until((tmp_path/"up").exists)
        for second in (lambda: save(tmp_path, 6), lambda: clear_leftovers(tmp_path)):
            with pytest.raises(UserError, match="is in use by"): second()
    finally: kill(child)
    assert clear_leftovers(tmp_path) == [".000004.saving"]


def test_a_file_system_without_locks_is_one_line(tmp_path):
    with patch.object(checkpointing.fcntl, "flock", side_effect=OSError(errno.ENOSYS, "Function not implemented")), pytest.raises(UserError, match="has no locks .Function not implemented."):
        save(tmp_path, 1)
    save(tmp_path, 1)


# --- many ranks ------------------------------------------------------------------------------------------------------

def test_all_ranks_write_into_one_checkpoint(tmp_path):
    def work(rank, agree):
        with committed(tmp_path, 3, rank=rank, agree=agree) as new:
            time.sleep(.05*rank)  # rank 0 must wait for the slowest
            (new/f"{rank}.bin").write_bytes(bytes([rank])*9)
        return latest(tmp_path)  # seen by all when any goes on
    assert Threads(3).run(work) == [tmp_path/"000003"]*3
    assert set(json.loads((tmp_path/"000003"/"manifest.json").read_text())["sha256"]) == {"0.bin", "1.bin", "2.bin"}


def test_saves_one_after_the_other_never_meet_their_own_lock(tmp_path):
    def work(rank, agree):
        for step in range(1, 30):
            try:
                with committed(tmp_path, step, rank=rank, agree=agree) as new:
                    (new/f"{rank}.bin").write_bytes(b"1")
                    if step % 3 == 0 and rank == step % 2: raise Oops("again")
            except UserError as e: assert "Oops: again" in str(e)
    assert Threads(2).run(work) == [None, None] and latest(tmp_path).name == "000029"


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 2), min_size=1), st.sampled_from(["before", "after"]), st.booleans())
def test_whoever_fails_all_give_up_with_the_same_line(bad, when, disk):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        save(folder, 1)
        def work(rank, agree):
            with committed(folder, 2, rank=rank, agree=agree) as new:
                if when == "after": (new/f"{rank}.bin").write_bytes(b"1")
                if rank in bad: raise OSError(errno.ENOSPC, "No space left on device") if disk else Oops("wrong")
                if when == "before": time.sleep(.01); (new/f"{rank}.bin").write_bytes(b"1")
        out = Threads(3).run(work)
        assert len({str(e) for e in out}) == 1 and all(isinstance(e, UserError) for e in out)
        assert f"rank {min(bad)}: " in str(out[0]) and ("is full" if disk else "Oops: wrong") in str(out[0])
        assert names(folder) == ["000001", "latest"]


@pytest.mark.parametrize("call", ["_clear", "_commit", "_prune", "seal"])
def test_what_fails_on_rank_0_is_told_on_all(call, tmp_path):
    save(tmp_path, 1)
    def work(rank, agree):
        with committed(tmp_path, 2, rank=rank, agree=agree) as new: (new/f"{rank}.bin").write_bytes(b"1")
    with patch.object(checkpointing, call, side_effect=OSError(errno.ENOSPC, "No space left on device")): out = Threads(2).run(work)
    assert {str(e) for e in out} == {f"{tmp_path/'000002'} was not saved: rank 0: the disk of {tmp_path} is full, make room or give another folder"}
    assert names(tmp_path) == ["000001", *(["000002"] if call == "_prune" else []), "latest"]


def test_the_folder_stays_until_the_last_rank_has_stopped_writing(tmp_path):
    def work(rank, agree):
        with committed(tmp_path, 2, rank=rank, agree=agree) as new:
            if rank == 0: raise Oops("early")
            for i in range(20): (new/f"{i}.bin").write_bytes(b"1"); time.sleep(.005)  # a folder that is gone would raise here, and be named
    assert {str(e).split(": ", 1)[1] for e in Threads(2).run(work)} == {"rank 0: Oops: early"}


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    def work(rank, agree):
        with committed(tmp_path/f"disk{rank}", 2, rank=rank, agree=agree) as new: (new/f"{rank}.bin").write_bytes(b"1")
    assert {"rank 1: " in str(e) and "made by rank 0, is not seen here: give a folder that all machines share" in str(e) for e in Threads(2).run(work)} == {True}


def test_every_other_rank_syncs_after_all_have_written(tmp_path):
    synced, lock, real = [], threading.Lock(), checkpointing.sync
    def noted(path):
        with lock: synced.append((threading.current_thread().name, path.name, sorted(p.name for p in path.parent.iterdir())))
        real(path)
    def work(rank, agree):
        threading.current_thread().name = str(rank)
        with committed(tmp_path, 2, rank=rank, agree=agree) as new: time.sleep(.05*(rank == 0)); (new/f"{rank}.bin").write_bytes(b"1")
    with patch.object(checkpointing, "sync", noted): assert Threads(2).run(work) == [None, None]
    assert {(who, name) for who, name, _ in synced} == {("1", "0.bin"), ("1", "1.bin")} and all({"0.bin", "1.bin"} <= set(there) for *_, there in synced)


def test_a_sync_that_fails_on_another_rank_ends_the_save(tmp_path):
    "The kernel may have dropped the bytes: no second try, and no checkpoint."
    save(tmp_path, 1)
    def work(rank, agree):
        threading.current_thread().name = str(rank)
        with committed(tmp_path, 2, rank=rank, agree=agree) as new: (new/f"{rank}.bin").write_bytes(b"1")
    def broken(path):
        if threading.current_thread().name == "1": time.sleep(.05); raise OSError(errno.EIO, "Input/output error")
    with patch.object(checkpointing, "sync", broken): out = Threads(2).run(work)
    assert {str(e) for e in out} == {f"{tmp_path/'000002'} was not saved: rank 1: OSError: [Errno 5] Input/output error"} and names(tmp_path) == ["000001", "latest"]


def gloo_rank(rank, port, folder):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    agree, lines = agree_over(), []
    def attempt(step, bad=None):
        try:
            with committed(folder/"run", step, rank=rank, agree=agree) as new:
                save_file(dict(x=torch.full((4,), float(step + rank))), new/f"{rank}.safetensors")
                if bad in (rank, "all"): raise OSError(errno.ENOSPC, "No space left on device")
                if bad == 9 and rank: os.kill(os.getpid(), signal.SIGKILL)
            lines.append("saved")
        except UserError as e: lines.append(str(e))
    with run_lock(folder/"run", rank=rank, agree=agree):
        attempt(2); attempt(3, bad="all"); attempt(4, bad=0); attempt(5, bad=1); attempt(6)
        (folder/f"{rank}.json").write_text(json.dumps(lines))
        attempt(8, bad=9)
    (folder/"last.json").write_text(json.dumps(lines[-1]))
    os._exit(0)


def test_two_processes_save_give_up_and_lose_a_rank(tmp_path):
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    start, children = time.monotonic(), [forked(lambda r=r: gloo_rank(r, port, tmp_path)) for r in (0, 1)]
    assert [ended(c) for c in children] == [0, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    zero, one = (json.loads((tmp_path/f"{r}.json").read_text()) for r in (0, 1))
    full = f"the disk of {tmp_path/'run'} is full, make room or give another folder"
    assert zero == one == ["saved", f"{tmp_path/'run'/'000003'} was not saved: rank 0: {full}", f"{tmp_path/'run'/'000004'} was not saved: rank 0: {full}", f"{tmp_path/'run'/'000005'} was not saved: rank 1: {full}", "saved"]
    assert json.loads((tmp_path/"last.json").read_text()) == f"{tmp_path/'run'/'000008'} was not saved: another rank is gone"
    assert latest(tmp_path/"run").name == "000006" and names(tmp_path/"run") == ["000002", "000006", "latest"]
    assert [load_file(tmp_path/"run"/"000006"/f"{r}.safetensors")["x"][0].item() for r in (0, 1)] == [6, 7]


# --- the power goes ----------------------------------------------------------------------------------------------------

def found(tree, folder):
    "Put a tree where a loader can look at it."
    folder.mkdir()
    for name, content in sorted(tree.items()):
        if content is None: (folder/name).mkdir(parents=True, exist_ok=True)
        else: (folder/name).parent.mkdir(parents=True, exist_ok=True); (folder/name).write_bytes(content)
    return folder


def saved_third(run):
    "Every power cut while the third checkpoint is saved, and after."
    save(run, 2); save(run, 4)
    return list(power_cuts(run, lambda: save(run, 6)))


def latest_or_lost(folder):
    try: return latest(folder).name
    except UserError: return "lost"


@pytest.mark.filterwarnings("error")  # the pointer is right on every disk: it never names what is not there
def test_no_power_cut_costs_a_checkpoint(tmp_path):
    rows = [(done, latest_or_lost(found(tree, tmp_path/str(i)))) for i, (done, tree) in enumerate(saved_third(tmp_path/"run"))]
    assert len(rows) > 100 and set(rows) == {(False, "000004"), (False, "000006"), (True, "000006")}


@pytest.mark.filterwarnings("ignore:.*Going on from")
@pytest.mark.parametrize("skip", ["files", "folders", "the run's folder"])
def test_without_a_sync_a_power_cut_costs_the_new_checkpoint(skip, tmp_path):
    "That every sync is needed, and that this test of power cuts sees a missing one."
    real = core.sync
    def some(path):
        if not dict(zip(("files", "folders", "the run's folder"), (path.is_file(), path.is_dir(), path.name == "run")))[skip]: real(path)
    with patch.object(core, "sync", some):
        trees = [tree for done, tree in saved_third(tmp_path/"run") if done]
    for i, tree in enumerate(random.Random(0).sample(trees, min(100, len(trees)))):
        if latest_or_lost(found(tree, tmp_path/str(i))) != "000006": return
    raise AssertionError("nothing was lost")


@pytest.mark.filterwarnings("ignore:.*Going on from")
def test_from_every_power_cut_the_run_goes_on_and_clears_up(tmp_path):
    trees = [tree for done, tree in saved_third(tmp_path/"run") if not done]
    for i, tree in enumerate(random.Random(0).sample(trees, 40)):
        folder = found(tree, tmp_path/str(i))
        latest(folder)
        save(folder, 8)
        assert latest(folder).name == "000008" and not [n for n in names(folder) if n[0] == "."]


def writes(*steps):
    "A way to write `new` over `old`, by the steps named; what a power cut may leave meanwhile and after."
    def do(f):
        g = f.with_name("t")
        for step in steps:
            if step == "over": f.write_text("new")
            elif step == "aside": g.write_text("new")
            elif step == "rename": os.replace(g, f)
            else: core.sync({"sync": g, "sync over": f, "sync folder": f.parent}[step])
    return do


@pytest.mark.parametrize("steps, during, after", [
    (["over"], {b"", b"n", b"new", b"old"}, {b"", b"n", b"new", b"old"}), (["over", "sync over"], {b"", b"n", b"new", b"old"}, {b"new"}),
    (["aside", "rename"], {b"", b"n", b"new", b"old"}, {b"", b"n", b"new", b"old"}), (["aside", "sync", "rename"], {b"new", b"old"}, {b"new", b"old"}),
    (["aside", "rename", "sync folder"], {b"", b"n", b"new", b"old"}, {b"", b"n", b"new"}), (["aside", "sync", "rename", "sync folder"], {b"new", b"old"}, {b"new"})])
def test_what_each_way_of_writing_may_leave(steps, during, after, tmp_path):
    f = tmp_path/"f"
    f.write_text("old")
    trees = list(power_cuts(tmp_path, lambda: writes(*steps)(f)))
    assert {t.get("f") for done, t in trees if not done} == during and {t.get("f") for done, t in trees if done} == after


def test_a_folder_is_found_only_when_the_folder_that_holds_it_was_synced(tmp_path):
    def do():
        (tmp_path/"d").mkdir(); (tmp_path/"d"/"f").write_text("xx"); core.sync(tmp_path/"d"/"f"); core.sync(tmp_path/"d")
        if up: core.sync(tmp_path)
    up = False
    assert {tuple(t.items()) for done, t in power_cuts(tmp_path, do) if done} == {(), (("d", None), ("d/f", b"xx"))}
    shutil.rmtree(tmp_path/"d")
    up = True
    assert [t for done, t in power_cuts(tmp_path, do) if done] == [{"d": None, "d/f": b"xx"}]


# --- kill -9 ------------------------------------------------------------------------------------------------------------

def state_of(step): return dict(x=torch.full((1_000_000,), float(step)), y=torch.full((1000,), float(step)))


def save_for_ever(folder, saved_one):
    step = int(latest(folder).name) if latest(folder) else 0
    while True:
        step += 1
        with committed(folder, step) as new: save_file(state_of(step), new/"state.safetensors")
        saved_one()


def save_over_for_ever(folder, saved_one):
    for step in range(10**9): torch.save(state_of(step), folder/"state.pt"); saved_one()


def killed(worker, folder, n, look):
    "Kill the worker `n` times, each time at a random moment of its second or third save; what `look` says after each."
    rng, out = random.Random(0), []
    folder.mkdir()
    for _ in range(n):
        up, down = os.pipe()
        child = forked(lambda: (torch.set_num_threads(1), worker(folder, lambda: os.write(down, b"1"))))
        os.close(down)
        start = time.monotonic()
        assert os.read(up, 1), "the worker died by itself"
        time.sleep(rng.uniform(0, 1.5)*(time.monotonic() - start))
        kill(child)
        os.close(up)
        out.append(look(folder))
    return out


@pytest.mark.filterwarnings("ignore:.*latest names no checkpoint")
def test_fifty_kills_leave_no_unreadable_checkpoint_and_the_naive_way_loses_several(tmp_path):
    cut = []
    def look(folder):
        cut.append(any(n[0] == "." for n in names(folder)))
        path = latest(folder)  # every checksum
        if path is None: return 0
        x = load_file(path/"state.safetensors")
        assert {v.unique().item() for v in x.values()} == {int(path.name)}  # of one step
        return int(path.name)
    def naive(folder):
        try: return bool(torch.load(folder/"state.pt"))
        except Exception: return False
    steps = killed(save_for_ever, tmp_path/"whole", 50, look)
    assert steps == sorted(set(steps)) and sum(cut) >= 8  # each life got further, nothing went back, and many kills came in the middle
    assert killed(save_over_for_ever, tmp_path/"naive", 20, naive).count(False) >= 3


def test_a_kill_while_saving_in_the_background_leaves_the_one_before(tmp_path):
    def work():
        def slow(held):
            with committed(tmp_path, 4) as new: save_file(held, new/"state.safetensors"); (tmp_path/"up").touch(); time.sleep(LIMIT)
        AsyncSaver().save(state_of(4), slow)
        time.sleep(LIMIT)
    save(tmp_path, 2)
    child = forked(work)
    try: until((tmp_path/"up").exists)
    finally: kill(child)
    assert latest(tmp_path).name == "000002" and clear_leftovers(tmp_path) == [".000004.saving"]


# --- the disk is full ------------------------------------------------------------------------------------------------

def test_a_disk_that_is_full_at_any_call_leaves_one_line_and_the_checkpoint_before(tmp_path):
    "Every call that may find the disk full does so once."
    calls, told = [(os, "fsync"), (os, "replace"), (os, "mkdir"), (os, "rename"), (Path, "write_text"), (Path, "write_bytes")], 0
    for at in range(1000):
        left, folder = [at], tmp_path/str(at)
        save(folder, 1); save(folder, 2)
        def failing(real):
            def call(*args, **kwargs):
                left[0] -= not (real.__name__ == "mkdir" and os.path.exists(args[0]))  # a folder that is there needs no room
                if left[0] == -1: raise OSError(errno.ENOSPC, "No space left on device", str(folder))
                return real(*args, **kwargs)
            return call
        patches = [patch.object(where, name, failing(getattr(where, name))) for where, name in calls]
        for p in patches: p.start()
        try: save(folder, 3)
        except UserError as e: told += 1; assert str(e) == f"{folder/'000003'} was not saved: the disk of {folder} is full, make room or give another folder"
        finally:
            for p in patches: p.stop()
        if left[0] >= 0: break
        steps, path = list(saved(folder)), latest(folder)
        assert steps in ([1, 2], [1, 2, 3], [2, 3]) and path.name in ("000002", "000003") and not [n for n in names(folder) if n[0] == "." and not n.endswith(".gone")]
        save(folder, 4)
        assert latest(folder).name == "000004" and not [n for n in names(folder) if n[0] == "."]
    assert told == at >= 15


def in_tmpfs(folder):
    "In a mount namespace of its own, a disk of 2 MB: what is told when a save does not fit, and what is left."
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.unshare(0x20000): os._exit(77)
    if any(subprocess.run(["mount", *args], capture_output=True, check=False).returncode for args in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=2m", "llms-full", folder])): os._exit(77)
    small, big, run = torch.ones(100_000), torch.ones(800_000), folder/"run"
    def raw(x, new): (new/"a.bin").write_bytes(x.numpy().tobytes())
    for n, write in enumerate((lambda x, new: save_file(dict(x=x), new/"a"), lambda x, new: torch.save(x, new/"a"), raw)):
        with committed(run, 10*n + 1, keep=keep_last(1)) as new: write(small, new)
        try:
            with committed(run, 10*n + 2) as new: write(big, new)
            raise AssertionError("2 MB held 3.2 MB")
        except UserError as e: assert str(e) == f"{run}/{10*n+2:06d} was not saved: the disk of {run} is full, make room or give another folder", str(e)
        gc.collect()  # the error holds torch's writer, and that the deleted file, whose room is free only now
        assert names(run) == [f"{10*n+1:06d}", "latest"] and latest(run).name == f"{10*n+1:06d}", names(run)
    with committed(run, 99, keep=keep_last(1)) as new: write(small, new)
    assert latest(run).name == "000099"


def test_a_disk_of_2_mb(tmp_path):
    status = ended(forked(lambda: in_tmpfs(tmp_path)))
    if status == 77: pytest.skip("needs root, to mount a small disk in a namespace of its own")
    assert status == 0 and names(tmp_path) == []


# --- in the background ------------------------------------------------------------------------------------------------

def test_what_is_written_is_what_was_when_save_was_called(tmp_path):
    x, go, got = dict(a=[torch.zeros(3), (torch.zeros(1), "word")], n=4), threading.Event(), []
    with AsyncSaver() as saver:
        saver.save(x, lambda held: (go.wait(LIMIT), got.append(held)))
        x["a"][0] += 1; x["a"][1][0].add_(1); x["n"] = 5
        assert not got
        go.set()
    assert got[0]["n"] == 4 and got[0]["a"][0].tolist() == [0, 0, 0] and got[0]["a"][1][0].item() == 0 and got[0]["a"][1][1] == "word"


def test_a_snapshot_shares_nothing_and_keeps_the_form():
    p = torch.nn.Parameter(torch.ones(2))
    copy = snapshot(dict(p=p, t=(p,), l=[p, 1, None]))
    assert not copy["p"].requires_grad and copy["p"].data_ptr() != p.data_ptr() and type(copy["t"]) is tuple and copy["l"][1:] == [1, None]


def test_saves_do_not_overlap_and_each_copies_after_the_one_before():
    x, running, order = torch.zeros(1), [], []
    def write(held):
        assert not running
        running.append(1); time.sleep(.02)
        x.add_(100)  # must be seen by the next copy: it is made when this has ended
        order.append(held.item()); running.pop()
    with AsyncSaver() as saver:
        for _ in range(3): saver.save(x, write)
    assert order == [0, 100, 200]


def test_what_fails_in_the_background_is_raised_once_at_the_next_call():
    def bad(held): raise UserError("the disk is full")
    saver, got = AsyncSaver(), []
    for call in (lambda: saver.save(1, got.append), saver.wait, saver.close):
        saver.save(0, bad)
        with pytest.raises(UserError, match="the disk is full"): call()
    assert not got
    saver.close()
    with pytest.raises(UserError, match="the disk is full"):
        with AsyncSaver() as saver: saver.save(0, bad)
    with pytest.raises(RuntimeError): saver.save(0, got.append)  # closed, also after the error


def test_closing_waits():
    got = []
    with AsyncSaver() as saver: saver.save(1, lambda held: (time.sleep(.1), got.append(held)))
    assert got == [1]


# --- what it is, and how often -------------------------------------------------------------------------------------------

def test_another_model_is_named():
    saved_, given_ = dict(model=dict(d_model=32, n_layers=2), seed=0, lr=.1, old=1), dict(model=dict(d_model=64, n_layers=2), seed=0, lr=.1, new=None)
    check_same(Path("x"), saved_, dict(saved_))
    with pytest.raises(UserError, match=r"^x is of a run with model.d_model=32, not model.d_model=64; no new, not new=None; old=1, not no old: start"): check_same(Path("x"), saved_, given_)
    with pytest.raises(UserError, match=r"a=0, not a=1; b=0, not b=1; c=0, not c=1 and 1 more: "): check_same(Path("x"), dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 1))


def test_the_inventory_says_what_everything_is(tmp_path):
    save(tmp_path, 1); save(tmp_path, 2)
    flip(tmp_path/"000001"/"a.bin")
    (tmp_path/".000003.saving").mkdir(); (tmp_path/".000003.saving"/"a").write_bytes(b"123"); (tmp_path/"notes").write_text("mine")
    rows = {name: (n, what) for name, n, what in inventory(tmp_path)}
    assert rows.keys() == {".000003.saving", ".save.lock", "000001", "000002", "latest", "notes"}
    assert rows["000002"][1] == "whole" and rows["000001"][1].startswith("damaged, may be deleted: ") and rows["notes"] == (4, "not ours")
    assert rows[".000003.saving"] == (3, "left by a killed save, may be deleted") and "lock" in rows[".save.lock"][1] and rows["latest"] == (7, "names the checkpoint to go on from")
    assert rows["000002"][0] == 8 + 1 + (tmp_path/"000002"/"manifest.json").stat().st_size


def test_the_best_interval_costs_least():
    "Against Daly's exact cost (2006), with failures that strike at random."
    from math import exp
    save_s, mtbf = 20., 3600.*6
    cost = lambda t: mtbf*(exp((t + save_s)/mtbf) - 1)/t
    best = min(range(60, 7200, 5), key=cost)
    assert cost(best_interval(save_s, mtbf)) < 1.0005*cost(best) and abs(best_interval(save_s, mtbf)/best - 1) < .05
