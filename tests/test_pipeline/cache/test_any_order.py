"""Writing, kills, second writers, damage, repair and reading, in any order: no wrong record, no fault unseen, no alarm.

Hypothesis draws the order. What a file must hold is known from a cache that nothing disturbed: so whether a shard is
sound, damaged or missing is found by comparing bytes, and `verify` must say the same.
"""

import copy
import os
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline.cache import (
    CacheHeader,
    ShardData,
    create_cache,
    open_cache,
    open_writer,
    remove_left_overs,
    repair,
    verify,
)
from pipeline.cache.format.commits import commit_file
from pipeline.cache.format.header import FILE
from pipeline.cache.format.records import Record
from pipeline.cache.reader import CacheReader
from pipeline.cache.stores import store_of
from pipeline.errors import CacheDamage, CacheError
from pipeline.files import PARTIAL
from pipeline.forking import fork
from tests.failing_disk import KINDS, failing, install
from tests.forked import exit_code
from tests.test_pipeline.cache.samples import key_of, make_cache, make_header, make_shard

SHARDS, VIEWS = 3, 2
TOMBSTONES = {3: "cannot identify image file"}
SHARD = st.integers(0, SHARDS - 1)
OPERATION = st.integers(1, 60)  # of a disk; more than most writers need, so that some of them end well
DAMAGES: dict[str, Callable[[bytes, int], bytes | None]] = {
    "a flipped bit": lambda content, at: content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :],
    "cut": lambda content, at: content[:at],
    "longer": lambda content, at: content + b" " * (at % 9 + 1),
    "other bytes": lambda content, at: bytes(len(content)),
    "gone": lambda content, at: None,
}


@cache
def header_of(store: str) -> CacheHeader:
    dataset = {"source": "photos", "kind": "folder", "count": 5, "digest": "d" * 32}
    return make_header(store, dataset=dataset, samples_per_shard=2)


@cache
def contents(store: str) -> list[ShardData]:
    return [make_shard(header_of(store), shard, TOMBSTONES) for shard in range(SHARDS)]


@cache
def files_of(store: str) -> dict[str, bytes]:
    """The files of an undisturbed cache."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_cache(Path(folder) / "cache", header_of(store), TOMBSTONES)
        return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


class CacheMachine(RuleBasedStateMachine):
    """A cache, at most one writer that is stopped in the midst of a shard, and at most one reader that stays open."""

    store: str

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "cache"
        self.header, self.expected = header_of(self.store), files_of(self.store)
        self.stopped, self.its_shard = 0, 0  # process of the writer
        self.kept: CacheReader | None = None

    def teardown(self) -> None:
        if self.stopped:
            os.kill(self.stopped, signal.SIGKILL)
            os.waitpid(self.stopped, 0)
        shutil.rmtree(self.root)

    # What is done to the cache

    @initialize(at=OPERATION, how=st.sampled_from(KINDS))
    def create(self, at: int, how: str) -> None:
        self.end(self.start(lambda: create_cache(self.path, self.header), at, how))
        create_cache(self.path, self.header)
        assert not [file for file in self.path.rglob("*") if file.name.endswith(PARTIAL)]

    @rule(shard=SHARD)
    def write(self, shard: int) -> None:
        before, record = self.state(shard), self.is_sound(commit_file(shard))
        try:
            self.extract(shard)
        except CacheDamage:
            assert record is False
            return
        assert record is not False
        if before == "missing":
            assert self.state(shard) == "sound"

    @rule(shard=SHARD, at=OPERATION, how=st.sampled_from(KINDS))
    def write_on_a_failing_disk(self, shard: int, at: int, how: str) -> None:
        self.end(self.start(lambda: self.extract(shard), at, how))

    @precondition(lambda self: not self.stopped)
    @rule(shard=SHARD, at=OPERATION)
    def stop_a_writer(self, shard: int, at: int) -> None:
        pid = self.start(lambda: self.extract(shard), at, "stop")
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            self.stopped, self.its_shard = pid, shard
        else:
            assert os.waitstatus_to_exitcode(status) in (0, 2)

    @precondition(lambda self: self.stopped)
    @rule()
    def write_the_same_shard(self) -> None:
        self.write(self.its_shard)

    @precondition(lambda self: self.stopped)
    @rule(number=st.sampled_from([signal.SIGCONT, signal.SIGKILL]))
    def let_it_go_on(self, number: signal.Signals) -> None:
        pid, self.stopped = self.stopped, 0
        os.kill(pid, number)
        assert self.end(pid) == (0 if number == signal.SIGCONT else -signal.SIGKILL)

    @precondition(lambda self: self.names())
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        file = self.path / data.draw(st.sampled_from(self.names()))
        before = file.read_bytes()
        how, at = data.draw(st.sampled_from(sorted(DAMAGES))), data.draw(st.integers(0, max(0, len(before) - 1)))
        after = DAMAGES[how](before, at) if before else None
        file.unlink()  # a reader that has it open goes on with what it held
        if after is not None:
            file.write_bytes(after)

    @rule()
    def mend(self) -> None:
        self.repair()
        assert [self.state(shard) for shard in range(SHARDS)] == ["sound"] * SHARDS
        assert all(map(self.is_sound, self.expected))

    @rule(at=OPERATION, how=st.sampled_from(KINDS))
    def mend_on_a_failing_disk(self, at: int, how: str) -> None:
        self.end(self.start(self.repair, at, how))

    @rule()
    def open_a_reader(self) -> None:
        records = [self.is_sound(commit_file(shard)) for shard in range(SHARDS)]
        try:
            self.kept = open_cache(self.path)
            self.kept.load_tables()
        except CacheDamage:
            assert False in records or "damaged" in map(self.state, range(SHARDS))

    @precondition(lambda self: self.kept)
    @rule()
    def read_what_was_open(self) -> None:
        assert self.kept is not None
        self.check_reads(self.kept, must_succeed=set())

    # What must hold after each of it

    @invariant()
    def verification_says_what_is_the_case(self) -> None:
        report, states = verify(self.path, "full"), [self.state(shard) for shard in range(SHARDS)]
        named = {finding.shard for finding in report.findings if finding.kind != "missing"}
        assert named - {None} == {shard for shard, state in enumerate(states) if state == "damaged"}
        assert report.missing == [shard for shard, state in enumerate(states) if state == "missing"]
        shared = set(store_of(self.path, self.header).derived(None))
        assert {finding.file for finding in report.findings if finding.shard is None} == {
            file for file in shared if not self.is_sound(file)
        }
        wrong = "damaged" in states or not all(map(self.is_sound, shared))
        assert report.sound == (not wrong and "missing" not in states)
        assert report.unfinished == (not wrong and "missing" in states)

    @invariant()
    def a_read_gives_the_right_record_or_an_error(self) -> None:
        states = [self.state(shard) for shard in range(SHARDS)]
        try:
            reader = open_cache(self.path)
        except CacheDamage:
            assert False in [self.is_sound(commit_file(shard)) for shard in range(SHARDS)]
            return
        self.check_reads(reader, {shard for shard, state in enumerate(states) if state == "sound"})

    def check_reads(self, reader: CacheReader, must_succeed: set[int]) -> None:
        for index in range(self.header.count):
            shard = index // self.header.samples_per_shard
            for view in range(VIEWS):
                try:
                    record = reader.read(index, view)
                except CacheError:
                    assert shard not in must_succeed or index in TOMBSTONES
                else:
                    check_record(record, contents(self.store)[shard], index - self.header.shard_range(shard).start)

    # How it is done

    def extract(self, shard: int) -> None:
        """What extraction does with a shard."""
        writer = open_writer(self.path)
        if not writer.is_committed(shard):
            writer.clean_partial(shard)
            writer.write_shard(shard, copy.deepcopy(contents(self.store)[shard]))

    def repair(self) -> None:
        repair(self.path, verify(self.path, "full"), lambda shard: copy.deepcopy(contents(self.store)[shard]))

    def start(self, work: Callable[[], object], at: int, how: str) -> int:
        """The process of `work`, on a disk that fails at its `at`-th operation."""
        pid = fork()
        if pid:
            return pid
        code = 1
        try:
            os.environ.update(failing(self.root, at, how))
            install()
            work()
            code = 0
        except CacheError:
            code = 2
        except BaseException:  # noqa: BLE001 - the end of a process
            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, pid: int) -> int:
        """Wait for a process. It ended well, with a line, or by the kill."""
        code = exit_code(pid, 120)
        assert code is not None, "it hangs"
        assert code in (0, 2, -signal.SIGKILL)
        return code

    def names(self) -> list[str]:
        """The files that there are, but the header, which nothing mends."""
        return [name for name in sorted(self.expected) if name != FILE and (self.path / name).is_file()]

    def is_sound(self, file: str) -> bool | None:
        """Whether a file holds what it must; None where it is missing."""
        place = self.path / file
        return place.read_bytes() == self.expected[file] if place.is_file() else None

    def state(self, shard: int) -> str:
        if self.is_sound(commit_file(shard)) is None:
            return "missing"
        store = store_of(self.path, self.header)
        files = [commit_file(shard), *store.files(shard), *store.derived(shard)]
        return "sound" if all(map(self.is_sound, files)) else "damaged"


def check_record(record: Record, content: ShardData, row: int) -> None:
    """It is what was written."""
    view = record.view
    arrays = {"tokens": content.tokens, "scale": content.scale, "attention": content.attention, "box": content.box}
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(record, name), None if array is None else array[row, view])
    assert record.key == key_of(record.index)
    assert (record.hflip, record.source_hash) == (content.hflip[row, view], content.source_hash[row])
    assert record.image == (content.images[row][view] if content.images is not None else None)  # type: ignore[index]


def run(store: str, examples: int, steps: int, derandomize: bool) -> None:
    run_state_machine_as_test(
        type(f"{store.title()}Machine", (CacheMachine,), {"store": store}),
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def stop_at_each(store: str, number: signal.Signals, operations: range) -> None:
    """A writer is stopped at an operation, another writes the same shard, and the first goes on, or is killed."""
    machine = type("Machine", (CacheMachine,), {"store": store})()
    try:
        for at in operations:
            shutil.rmtree(machine.path, ignore_errors=True)
            create_cache(machine.path, machine.header)
            machine.stop_a_writer(0, at)
            if not machine.stopped:  # it has fewer operations
                assert at > 30
                return
            machine.write_the_same_shard()
            machine.let_it_go_on(number)
            assert machine.state(0) == "sound", at
            report = verify(machine.path, "full")
            assert (report.missing, report.unfinished) == ([1, 2], True), at
            remove_left_overs(machine.path, report)
            assert not [file for file in machine.path.rglob("*") if file.name.endswith(PARTIAL)], at
    finally:
        machine.teardown()


@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_a_stopped_writer_and_a_second_one_spoil_nothing(store: str, number: signal.Signals) -> None:
    stop_at_each(store, number, range(2, 1000, 5 if store == "webdataset" else 19))


@pytest.mark.slow  # hundreds of writers
@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_a_writer_stopped_at_any_operation_and_a_second_one_spoil_nothing(store: str, number: signal.Signals) -> None:
    stop_at_each(store, number, range(1, 1000))


def test_whatever_happens_to_a_cache(store: str) -> None:
    run(store, examples=5, steps=12, derandomize=True)


@pytest.mark.slow  # hundreds of caches
def test_whatever_happens_to_many_caches(store: str) -> None:
    run(store, examples=200, steps=20, derandomize=False)
