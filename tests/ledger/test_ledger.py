"""The ledger never says less than was released: kills, torn and altered files, full disks, rollbacks, two writers."""

import errno
import json
import os
import random
import resource
import shutil
import signal
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dp import durable
from hf_dp.accounting.epsilon import spent
from hf_dp.errors import LedgerError
from hf_dp.ledger.format import GENESIS, encode, header_record, parse, step_record
from hf_dp.ledger.ledger import LEDGER_NAME, Ledger, LedgerHeader, read_ledger, refuse_rollback
from hf_dp.mechanism import Segment
from hf_dp.randomness.noise import NoiseSource
from hf_dp.step.release import Releaser
from tests.support.children import KILLED, Bomb, in_child
from tests.support.marks import quick

HEADER = LedgerHeader(num_examples=1000, unit="record", relation="zero-out", delta=1e-5, data_fingerprint="ab" * 32)
SETTINGS = {"sample_rate": 0.05, "joint_noise_multiplier": 1.0, "clip_norm": 0.5, "expected_batch_size": 50}


def opened(folder: Path, steps: int = 0, header: LedgerHeader = HEADER, **settings: Any) -> Ledger:
    ledger = Ledger.open(folder / LEDGER_NAME, header)
    ledger.begin(**{**SETTINGS, **settings})
    for _ in range(steps):
        ledger.charge()
    return ledger


def written(folder: Path, steps: int = 3) -> bytes:
    """The bytes of a closed ledger of so many steps."""
    opened(folder, steps).close()
    return (folder / LEDGER_NAME).read_bytes()


def checkpoint(ledger: Ledger, folder: Path, number: int) -> Path:
    saved = folder / f"checkpoint-{number}"
    saved.mkdir(exist_ok=True)
    ledger.copy_to(saved)
    return saved


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_steps_come_back_as_they_were_charged(tmp_path: Path) -> None:
    with opened(tmp_path, 3) as ledger:
        assert ledger.charge() == 4
        ledger.begin(**{**SETTINGS, "joint_noise_multiplier": 2.0})
        ledger.charge()
        record = ledger.record()
    assert record == read_ledger(tmp_path / LEDGER_NAME)
    assert record.segments == (Segment(0.05, 1.0, 4), Segment(0.05, 2.0, 1))
    assert (record.num_steps, record.torn, record.header) == (5, False, HEADER)
    with opened(tmp_path, 2, joint_noise_multiplier=2.0) as ledger:
        assert ledger.num_steps == 7
        assert ledger.segments() == (Segment(0.05, 1.0, 4), Segment(0.05, 2.0, 3))


def test_a_step_is_on_disk_and_synced_when_charge_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda d: (fsync(d), synced.append((d, os.fstat(d).st_size)))[0])
    with opened(tmp_path) as ledger:
        for step in range(1, 4):
            ledger.charge()
            assert synced[-1] == (ledger.fileno(), (tmp_path / LEDGER_NAME).stat().st_size)
            assert read_ledger(tmp_path / LEDGER_NAME).num_steps == step  # while it is open, too


def test_anybody_can_check_the_chain(tmp_path: Path) -> None:
    """The format in its own words, without the code that reads it."""
    head = GENESIS
    for line in written(tmp_path).decode().splitlines():
        body, found = line[: line.rindex(',"hash"')] + "}", json.loads(line)["hash"]
        head = sha256((head + body).encode()).hexdigest()
        assert found == head
    assert read_ledger(tmp_path / LEDGER_NAME).head == head


def test_charging_needs_a_segment_and_an_open_ledger(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / LEDGER_NAME, HEADER) as ledger:
        with pytest.raises(LedgerError, match=r"call begin\(\)"):
            ledger.charge()
        ledger.begin(**SETTINGS)
        assert ledger.num_steps == 0
    ledger.close()  # a second time: nothing
    with pytest.raises(LedgerError, match="is closed"):
        ledger.charge()


@pytest.mark.parametrize(
    "bad",
    [
        *({"sample_rate": x} for x in (0.06, 0.0)),
        *({"joint_noise_multiplier": x} for x in (-1.0, float("nan"))),
        *({"clip_norm": x} for x in (0.0, float("inf"))),
        *({"expected_batch_size": x} for x in (0, 2000)),
    ],
    ids=str,
)
def test_a_segment_that_cannot_be_is_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with opened(tmp_path, 1) as ledger, pytest.raises(LedgerError, match="a segment that can't be"):
        ledger.begin(**{**SETTINGS, **bad})
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 1


# ---- F1: killed at any point -----------------------------------------------------------------------------------------

POINTS = [
    *(("write", when, nth) for when in ("before", "half", "after") for nth in (1, 2, 3, 6)),
    *(("fsync", when, nth) for when in ("before", "after") for nth in (1, 2, 3, 5, 9)),
    *(("link", when, 1) for when in ("before", "after")),
    *(("replace", when, nth) for when in ("before", "after") for nth in (1, 2)),
    *(("charge", when, nth) for when in ("before", "after") for nth in (1, 3)),
    *(("noise", when, nth) for when in ("before", "after") for nth in (1, 3)),
    *(("update", when, nth) for when in ("before", "after") for nth in (1, 3)),
]
STEPS = 6


def one_session(folder: Path, bomb: Bomb) -> None:
    """Six steps with a checkpoint after every second; an observer sees each request for noise as early as can be."""
    os.write, os.fsync = bomb.around("write", os.write), bomb.around("fsync", os.fsync)
    os.link, os.replace = bomb.around("link", os.link), bomb.around("replace", os.replace)
    ledger = opened(folder)
    ledger.charge = bomb.around("charge", ledger.charge)  # type: ignore[method-assign]
    source = NoiseSource()
    draw = bomb.around("noise", source.gaussian)

    def observed(*args: Any, **kwargs: Any) -> torch.Tensor:
        with open(folder / "observed", "ab", buffering=0) as file:
            file.write(b"x")
        return draw(*args, **kwargs)

    source.gaussian = observed  # type: ignore[method-assign]
    release = Releaser(ledger, source)
    update = bomb.around("update", lambda noisy: None)
    for step in range(STEPS):
        update(release(torch.ones(10), sensitivity=0.5, noise_multiplier=1.0))
        if step % 2:
            checkpoint(ledger, folder, step)


def kills_under(folder: Path, points: list[tuple[str, str, int]]) -> int:
    """Kills a session at each point, all in one folder, and ends with a whole one. Returns how many were killed."""
    observed, killed = folder / "observed", 0
    for point in points:
        killed += in_child(lambda point=point: one_session(folder, Bomb(*point))) == KILLED
        seen = observed.stat().st_size if observed.exists() else 0
        charged = read_ledger(folder / LEDGER_NAME) if (folder / LEDGER_NAME).exists() else None
        assert (charged.num_steps if charged else 0) >= seen
        assert (charged.num_steps if charged else 0) <= seen + killed  # a kill costs one step at the most
        if charged:
            assert spent(charged.segments, 1e-5).epsilon >= spent([Segment(0.05, 1.0, seen)], 1e-5).epsilon
    return killed


@pytest.mark.parametrize("point", quick(POINTS[::3], POINTS), ids=str)
def test_a_kill_at_any_point_never_hides_a_step(point: tuple[str, str, int], tmp_path: Path) -> None:
    assert kills_under(tmp_path, [point, ("none", "", 0)]) == 1
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps >= STEPS


@pytest.mark.slow
def test_kills_one_after_another_in_one_folder(tmp_path: Path) -> None:
    points = list(POINTS)
    random.Random(0).shuffle(points)
    killed = kills_under(tmp_path, [*points, ("none", "", 0)])
    assert killed >= len(points) - 2  # the ledger is created once, so its link is passed once


# ---- F2, F3: torn and altered ----------------------------------------------------------------------------------------


def test_a_torn_last_line_counts_as_one_step_at_each_of_its_bytes(tmp_path: Path) -> None:
    data = written(tmp_path)
    start = data[:-1].rindex(b"\n") + 1
    for end in range(start + 1, len(data) - 1):
        record = parse(data[:end], "torn")
        assert (record.num_steps, record.torn) == (3, True)
    whole = parse(data[:-1], "lacking its newline alone")
    assert (whole.num_steps, whole.torn) == (3, False)
    assert parse(data[:start], "before it was written").num_steps == 2


@pytest.mark.parametrize("lost", [1, 2, 30, 80])
def test_a_torn_ledger_goes_on_where_it_was(lost: int, tmp_path: Path) -> None:
    data = written(tmp_path)
    (tmp_path / LEDGER_NAME).write_bytes(data[:-lost])
    with opened(tmp_path) as ledger:
        assert ledger.num_steps == 3
        assert ledger.charge() == 4
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert (record.num_steps, record.torn) == (4, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [LEDGER_NAME]


def test_zeros_after_a_power_failure_are_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / LEDGER_NAME).write_bytes(written(tmp_path) + bytes(100))
    with opened(tmp_path) as ledger:
        assert ledger.num_steps == 4


def test_a_torn_segment_costs_a_step_of_the_one_before(tmp_path: Path) -> None:
    data = written(tmp_path, 0)
    first = data[: data.index(b"\n") + 1]
    assert parse(data[:-20], "the first segment").num_steps == 0
    with opened(tmp_path, 2, joint_noise_multiplier=1.0) as ledger:
        ledger.begin(**{**SETTINGS, "joint_noise_multiplier": 3.0})
    data = (tmp_path / LEDGER_NAME).read_bytes()
    assert parse(data[:-20], "the second").segments == (Segment(0.05, 1.0, 3),)
    (tmp_path / LEDGER_NAME).write_bytes(first + b'{"kind":"seg')
    with opened(tmp_path, 1) as ledger:
        assert ledger.num_steps == 1


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path, 2)
    for index in range(len(data)):
        for bit in range(8):
            altered = bytearray(data)
            altered[index] ^= 1 << bit
            with pytest.raises(LedgerError):
                parse(bytes(altered), "altered")


def test_lines_left_out_doubled_swapped_or_foreign_are_refused(tmp_path: Path) -> None:
    lines = written(tmp_path, 4).splitlines(keepends=True)
    foreign = encode(step_record(5), sha256(b"of another ledger").hexdigest())[0]
    for altered in (
        [*lines[:3], *lines[4:]],
        [*lines, lines[-1]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines, foreign],
        lines[1:],
        [b"\n", *lines],
        [*lines[:3], b"\n", *lines[3:]],
    ):
        with pytest.raises(
            LedgerError, match=r"line \d.*what was spent is not known.*Put the newest undamaged copy back"
        ):
            parse(b"".join(altered), "altered")
    with pytest.raises(LedgerError, match="empty file"):
        parse(b"", "empty")


# ---- F15, F20: values and versions that the hashes vouch for, and nobody believes ------------------------------------


def forged(*records: dict[str, Any]) -> bytes:
    """A ledger of these records with hashes that are right, whatever they say."""
    data, head = b"", GENESIS
    for record in records:
        body = json.dumps(record, separators=(",", ":"))
        head = sha256(f"{head}{body}".encode()).hexdigest()
        data += f'{body[:-1]},"hash":"{head}"}}\n'.encode()
    return data


FIRST, STEP = header_record(HEADER), {"kind": "step", "n": 1}
SEGMENT = {"kind": "segment", **{name.removeprefix("joint_"): value for name, value in SETTINGS.items()}}
NONSENSE = [float("nan"), float("inf"), -float("inf"), -1, "1", None, True, [1], {}, 10**400]


def test_the_forgery_is_otherwise_perfect() -> None:
    assert parse(forged(FIRST, SEGMENT, STEP), "forged").num_steps == 1


@pytest.mark.parametrize("bad", [*NONSENSE, 0, 0.0, 1.5], ids=repr)
@pytest.mark.parametrize("name", ["sample_rate", "noise_multiplier", "clip_norm", "expected_batch_size"])
def test_nonsense_in_a_segment_is_refused_though_the_hash_is_right(name: str, bad: Any) -> None:
    if name == "noise_multiplier" and (bad in (0, 1.5) and bad is not False):
        return  # no noise is a value, and is accounted for as infinite
    if name == "clip_norm" and bad == 1.5:
        return
    with pytest.raises(LedgerError, match="line 2"):
        parse(forged(FIRST, {**SEGMENT, name: bad}, STEP), "forged")


@pytest.mark.parametrize("bad", [*NONSENSE, 0, 2, 1.0], ids=repr)
def test_nonsense_in_a_step_is_refused_though_the_hash_is_right(bad: Any) -> None:
    with pytest.raises(LedgerError, match="line 3"):
        parse(forged(FIRST, SEGMENT, {**STEP, "n": bad}), "forged")


@pytest.mark.parametrize(
    ("name", "bad"),
    [("num_examples", x) for x in [*NONSENSE, 0, 1000.0]]
    + [("delta", x) for x in [*NONSENSE, 0.0, 1.0, 2.0, 1e-13]]
    + [("debug", x) for x in [1, "no", None]]
    + [(name, x) for name in ("unit", "relation") for x in [1, "", None]]
    + [("data_fingerprint", x) for x in [1, ""]],
    ids=repr,
)
def test_nonsense_in_a_header_is_refused_though_the_hash_is_right(name: str, bad: Any, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="line 1"):
        parse(forged({**FIRST, name: bad}, SEGMENT, STEP), "forged")


@pytest.mark.parametrize("version", [0, 3, 99, "1", 1.0, True, None])
def test_another_version_is_refused_and_never_reinterpreted(version: Any) -> None:
    with pytest.raises(
        LedgerError, match=r"expected version 1 or 2, found .*read it with the release of hf_dp that wrote it"
    ):
        parse(forged({**FIRST, "version": version}, SEGMENT, STEP), "forged")


@pytest.mark.parametrize(
    "records",
    [
        [SEGMENT, STEP],
        [FIRST, STEP],
        [FIRST, FIRST, SEGMENT, STEP],
        [FIRST, SEGMENT, {**STEP, "n": 2}],
        [FIRST, SEGMENT, STEP, {**STEP, "n": 1}],
        [FIRST, SEGMENT, {"kind": "refund", "n": 1}],
        [FIRST, SEGMENT, {**STEP, "extra": 1}],
        [{**FIRST, "extra": 1}, SEGMENT],
        [FIRST, {k: v for k, v in SEGMENT.items() if k != "clip_norm"}],
    ],
    ids=range(9),
)
def test_records_that_may_not_follow_are_refused(records: list[dict[str, Any]]) -> None:
    with pytest.raises(LedgerError):
        parse(forged(*records), "forged")


# ---- F4, F5: missing and rolled back ---------------------------------------------------------------------------------


def test_a_deleted_ledger_is_missed_where_a_checkpoint_remembers_it(tmp_path: Path) -> None:
    with opened(tmp_path, 3) as ledger:
        saved = checkpoint(ledger, tmp_path, 3)
    (tmp_path / LEDGER_NAME).unlink()
    for attempt in (lambda: opened(tmp_path), lambda: refuse_rollback(tmp_path / LEDGER_NAME, saved)):
        with pytest.raises(
            LedgerError, match=r"checkpoint-3 was saved after 3 charged steps .* is missing.*Put the newest"
        ):
            attempt()
    assert not (tmp_path / LEDGER_NAME).exists()


def test_an_older_ledger_copied_back_is_refused(tmp_path: Path) -> None:
    old = written(tmp_path, 2)
    with opened(tmp_path, 3) as ledger:
        saved = checkpoint(ledger, tmp_path, 5)
    (tmp_path / LEDGER_NAME).write_bytes(old)
    for attempt in (lambda: opened(tmp_path), lambda: refuse_rollback(tmp_path / LEDGER_NAME, saved)):
        with pytest.raises(LedgerError, match="has 2 steps and is not its continuation"):
            attempt()
    assert (tmp_path / LEDGER_NAME).read_bytes() == old


def test_a_ledger_that_went_another_way_is_refused(tmp_path: Path) -> None:
    """As many steps as the checkpoint's, or more, but not the same ones."""
    with opened(tmp_path, 2, joint_noise_multiplier=1.0) as ledger:
        checkpoint(ledger, tmp_path, 2)
    (tmp_path / LEDGER_NAME).unlink()
    other = tmp_path / "other"
    opened(other, 9, joint_noise_multiplier=50.0).close()
    shutil.copy(other / LEDGER_NAME, tmp_path / LEDGER_NAME)
    with pytest.raises(LedgerError, match="not its continuation"):
        opened(tmp_path)


def test_resuming_needs_a_whole_copy_in_the_checkpoint(tmp_path: Path) -> None:
    with opened(tmp_path, 3) as ledger:
        saved = checkpoint(ledger, tmp_path, 3)
    refuse_rollback(tmp_path / LEDGER_NAME, saved)
    data = (saved / LEDGER_NAME).read_bytes()
    for cut in (1, 40):
        (saved / LEDGER_NAME).write_bytes(data[:-cut])
        with pytest.raises(LedgerError, match="cut short"):
            refuse_rollback(tmp_path / LEDGER_NAME, saved)
    (saved / LEDGER_NAME).unlink()
    with pytest.raises(LedgerError, match="what it spent is not known"):
        refuse_rollback(tmp_path / LEDGER_NAME, saved)


def test_a_ledger_changed_while_it_is_open_stops_the_next_charge(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_NAME
    for change, message in (
        (lambda: path.unlink(), "is gone"),
        (lambda: durable.replace(path, path.read_bytes()), "changed under the running training"),
        (lambda: path.open("ab").write(b"x"), "changed under the running training"),
        (lambda: os.truncate(path, 10), "changed under the running training"),
    ):
        with opened(tmp_path, 1) as ledger:
            change()
            with pytest.raises(LedgerError, match=message):
                ledger.charge()
            with pytest.raises(LedgerError, match=message):
                ledger.copy_to(tmp_path)
        path.unlink(missing_ok=True)


# ---- F6, F8: a disk that refuses -------------------------------------------------------------------------------------


def fill_up(folder: Path, room: int) -> None:
    """In a child, where no file may grow by more than `room` bytes: steps until the ledger refuses, and no further."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    ledger, drawn = opened(folder, 2), []
    source = NoiseSource()
    draw = source.gaussian
    source.gaussian = lambda *a, **k: (drawn.append(1), draw(*a, **k))[1]  # type: ignore[method-assign]
    release = Releaser(ledger, source)
    size = (folder / LEDGER_NAME).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, size + room))

    def release_many() -> None:
        for _ in range(100):
            release(torch.ones(4), sensitivity=0.5, noise_multiplier=1.0)

    for _ in range(2):  # a second attempt is refused as well
        with pytest.raises(LedgerError) as refusal:
            release_many()
        (folder / "refusals").open("a").write(f"{refusal.value}\n")
    (folder / "drawn").write_text(str(len(drawn)))


@pytest.mark.parametrize("room", [0, 1, 50, 97, 98, 150, 400])
def test_a_full_disk_stops_before_the_release(room: int, tmp_path: Path) -> None:
    assert in_child(lambda: fill_up(tmp_path, room)) == 0
    drawn = int((tmp_path / "drawn").read_text())
    first, second = (tmp_path / "refusals").read_text().splitlines()
    assert "File too large): stopped before anything was released. Make room" in first
    assert "an earlier write did not finish; open the ledger again" in second
    assert 2 + drawn <= read_ledger(tmp_path / LEDGER_NAME).num_steps <= 2 + drawn + 1
    with opened(tmp_path) as ledger:  # with room again
        assert ledger.charge() >= 2 + drawn + 1


def test_no_room_for_a_new_ledger_leaves_nothing(tmp_path: Path) -> None:
    def without_room() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
        with pytest.raises(LedgerError, match="Make room or give write access"):
            opened(tmp_path / "new")

    assert in_child(without_room) == 0
    assert list((tmp_path / "new").iterdir()) == []


def test_a_full_disk_while_copying_leaves_the_older_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, 2) as ledger:
        saved = checkpoint(ledger, tmp_path, 2)
        before = (saved / LEDGER_NAME).read_bytes()
        ledger.charge()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "write_fully", _refuse(errno.ENOSPC))
            with pytest.raises(LedgerError, match="No space left"):
                ledger.copy_to(saved)
        assert (saved / LEDGER_NAME).read_bytes() == before
        assert [p.name for p in saved.iterdir()] == [LEDGER_NAME]


def _refuse(code: int) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    written(tmp_path / "old")
    for folder, mode in ((tmp_path, 0o500), (tmp_path / "old" / LEDGER_NAME, 0o400)):
        before = folder.stat().st_mode
        folder.chmod(mode)
        with pytest.raises(LedgerError, match="give write access"):
            opened(tmp_path / "new" if folder == tmp_path else tmp_path / "old")
        folder.chmod(before)


@pytest.mark.parametrize("call", ["open", "write", "fsync"])
def test_a_read_only_file_system_is_refused_at_the_start(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _refuse(errno.EROFS))
        with pytest.raises(LedgerError, match="give write access"):
            opened(tmp_path)
    opened(tmp_path).close()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(LedgerError, match="can't be written"):
        opened(tmp_path / "out")


# ---- F9: one writer at a time ----------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_has_closed(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(LedgerError, match=r"in use by another process.*can't share one output_dir"):
            opened(tmp_path)

    ledger = opened(tmp_path, 1)
    second()
    assert in_child(second) == 0
    ledger.charge()  # and the first is not disturbed
    ledger.close()
    assert in_child(lambda: opened(tmp_path, 1)) == 0
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 3


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    def dies_holding_it() -> None:
        opened(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(dies_holding_it) == KILLED
    opened(tmp_path, 1).close()


def test_a_forked_worker_neither_holds_the_lock_nor_writes(tmp_path: Path) -> None:
    ledger = opened(tmp_path, 1)
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            ledger.charge()
        except LedgerError:
            os.write(writer, b"refused")
        signal.pause()
        os._exit(1)
    try:
        assert os.read(reader, 7) == b"refused"
        ledger.charge()
        ledger.close()
        opened(tmp_path, 1).close()  # though the worker lives
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(reader)
        os.close(writer)
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 3


def test_many_that_start_at_once_leave_one_whole_ledger(tmp_path: Path) -> None:
    def try_until_through() -> None:
        while True:
            try:
                opened(tmp_path, 1).close()
                return
            except LedgerError as error:
                if "in use by another process" not in str(error):
                    raise

    workers = []
    for _ in range(6):
        workers.append(os.fork())
        if workers[-1] == 0:
            status = in_child(try_until_through)
            os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(w, 0)[1]) for w in workers] == [0] * 6
    assert read_ledger(tmp_path / LEDGER_NAME).num_steps == 6


# ---- F14, F16: changed settings, moved folders -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "segment"),
    [
        ({"joint_noise_multiplier": 0.7}, Segment(0.05, 0.7, 2)),
        ({"sample_rate": 0.1, "expected_batch_size": 100}, Segment(0.1, 1.0, 2)),
        ({"joint_noise_multiplier": 0.0}, Segment(0.05, 0.0, 2)),
    ],
)
def test_a_changed_sigma_or_q_is_a_segment_of_its_own_and_composed(
    changed: dict[str, Any], segment: Segment, tmp_path: Path
) -> None:
    opened(tmp_path, 3).close()
    opened(tmp_path, 2, **changed).close()
    segments = read_ledger(tmp_path / LEDGER_NAME).segments
    assert segments == (Segment(0.05, 1.0, 3), segment)
    assert spent(segments, 1e-5).epsilon > spent([Segment(0.05, 1.0, 3)], 1e-5).epsilon


def test_a_changed_clip_norm_is_recorded_and_costs_nothing_by_itself(tmp_path: Path) -> None:
    opened(tmp_path, 3).close()
    opened(tmp_path, 2, clip_norm=5.0).close()
    record = read_ledger(tmp_path / LEDGER_NAME)
    assert [(s.clip_norm, s.num_steps) for s in record.executed] == [(0.5, 3), (5.0, 2)]
    assert record.segments == (Segment(0.05, 1.0, 5),)


CHANGES = {
    "num_examples": 1001,
    "unit": "user",
    "relation": "replace-one",
    "delta": 1e-4,
    "data_fingerprint": "cd" * 32,
    "debug": True,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_ledger_of_other_data_or_another_promise_is_refused(name: str, tmp_path: Path) -> None:
    before = written(tmp_path)
    with pytest.raises(LedgerError, match=rf"{name}: the ledger has .*, this run .*start anew in another output_dir"):
        opened(tmp_path, header=replace(HEADER, **{name: CHANGES[name]}))
    assert (tmp_path / LEDGER_NAME).read_bytes() == before
    opened(tmp_path).close()  # nobody holds it


def test_every_difference_is_named_at_once(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(LedgerError) as refusal:
        opened(tmp_path, header=LedgerHeader(**CHANGES))
    assert all(f"{name}: the ledger has" in str(refusal.value) for name in CHANGES)


def test_a_moved_folder_and_another_clock_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    with opened(old, 3) as ledger:
        checkpoint(ledger, old, 3)
    old.rename(new)
    for path in new.rglob("*"):
        os.utime(path, (0, 4_000_000_000))
    monkeypatch.chdir(new)
    with opened(Path(), 1) as ledger:
        assert ledger.num_steps == 4
    assert b"old" not in (new / LEDGER_NAME).read_bytes()
    assert os.uname().nodename.encode() not in (new / LEDGER_NAME).read_bytes()
