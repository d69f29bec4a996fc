"""The only loop: it applies a plan of any verb. It stages the shards, checks them against the plan, and commits them.

The same plan gives the same bytes, for any number of workers, in any order, and when a run is interrupted and resumed.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from moeconv import __version__
from moeconv.checkpoint.companions import Companions, find_companions, is_licence
from moeconv.checkpoint.hashes import file_sha256
from moeconv.checkpoint.output import Finished, OutputDirectory
from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.reader import MANIFEST_NAME, Checkpoint
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.staging import StagingLock
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.checkpoint.target import check_target
from moeconv.checkpoint.writer import ShardWriter, output_errors, write_file
from moeconv.errors import CheckError, InputError, Interrupted, LimitError, OutputError, UsageError, escape
from moeconv.plan.flow import HOLD, ByteSource, Flow, source_crc, write_items
from moeconv.plan.limits import check_limits
from moeconv.plan.manifest import json_bytes, manifest_of, small_files
from moeconv.plan.memory import configure_malloc, free_memory, worker_bytes
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.overlay import fingerprint
from moeconv.plan.phases import phase
from moeconv.plan.plan import Plan, Shard
from moeconv.plan.promises import check_written
from moeconv.types import JsonObject

_TOGETHER = 8  # files that are written at a time from one buffer; each of them has a write buffer too

# What a check found: JSON values for the block of the result. Each verb has its own.
Findings: TypeAlias = Mapping[str, Any]
Check = Callable[[Path], Findings]
Describe = Callable[[list[JsonObject], Findings], Mapping[str, bytes]]


@dataclass(frozen=True)
class Result:
    """What a run wrote, under the names of the JSON contract. `extra` is what `check` returned."""

    output: str
    complete: bool
    files: Mapping[str, str]
    seconds: float
    peak_rss_bytes: int
    warnings: list[str]
    extra: Findings = field(default_factory=dict)


def default_jobs(each: int = 0) -> int:
    """The number of workers without --jobs: one per processor that this process may use, as far as the free memory
    suffices. `each` is the bytes that a worker takes."""
    room = free_memory() // 2 // each if each else 1 << 30
    return max(1, min(len(os.sched_getaffinity(0)), room))


def checked_jobs(jobs: int | None, *, each: int = 0) -> int:
    """The number of workers for --jobs; without it, what `default_jobs` returns. Raises UsageError for a number below
    1."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs} must be at least 1", hint="Leave --jobs out for one worker per processor.")
    return default_jobs(each) if jobs is None else jobs


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    # includes what a large parent process held when it forked this one, so it is used only where /proc is missing
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parse_part(text: str | None) -> tuple[int, int] | None:
    """`--part i/n` -> (i, n), 0 <= i < n. Raises UsageError."""
    if text is None:
        return None
    try:
        i, n = (int(x) for x in text.split("/"))
    except ValueError:
        i, n = -1, 0
    if not 0 <= i < n:
        raise UsageError(
            f"--part {escape(text)} is not i/n with 0 <= i < n", hint="Four runs have --part 0/4, 1/4, 2/4 and 3/4."
        )
    return i, n


@phase("write")
def execute(
    plan: Plan,
    *,
    source: Checkpoint,
    out: str | os.PathLike[str],
    origins: Mapping[str, ByteSource] | None = None,
    check: Check | None = None,
    describe: Describe | None = None,
    jobs: int | None = None,
    part: tuple[int, int] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    meter: Meter | None = None,
    lock: StagingLock | None = None,
) -> Result:
    """Write the checkpoint that `plan` describes to the directory `out`.

    `origins` are the byte sources besides "source" that the inputs of the plan name. `lock` is the lock of OUT's
    staging directory where the caller holds it already. `check` is called with the staged directory before it is
    committed. The result has what it returns; when it raises an error, OUT is not written. `describe` makes files for
    people, such as the model card, from the steps of the manifest and from what `check` returned; the manifest does not
    list them.

    Raises UsageError, InputError, OutputError, CheckError or Interrupted; OUT is then as it was before.
    """
    began = time.monotonic()
    configure_malloc()
    given, out = out, Path(os.path.abspath(out))
    meter = meter or SilentMeter()
    flow = Flow({"source": source, **(origins or {})}, meter, strict)
    jobs = checked_jobs(jobs, each=worker_bytes(plan))
    companions = companions_of(plan, source)  # an error in them must not come after hours of work
    check_target(Path(given), reads=_read_by(flow), overwrite=overwrite)
    check_limits(plan)
    key = _resume_key(plan, source, origins or {})
    with OutputDirectory(out, key=key, overwrite=overwrite, shared=part is not None, lock=lock) as directory:
        try:
            records = _write_shards(plan, flow, directory, jobs=jobs, part=part)
            files, extra, complete = _complete(plan, source, companions, flow, directory, records, check, describe)
        except LimitError:  # a file is larger than moeconv reads; what is written may be good, so it is kept
            raise
        except (InputError, CheckError):
            directory.discard()
            raise
    warnings = [*companions.warnings, *sorted(flow.warnings)]
    return Result(str(out), complete, files, time.monotonic() - began, peak_rss_bytes(), warnings, extra)


def companions_of(plan: Plan, source: Checkpoint) -> Companions:
    """The files beside the source's shards that are copied to the output of `plan`. Raises InputError."""
    found = find_companions(source, plan.config, made=plan.texts)
    if plan.gguf:  # the file includes config and tokenizer
        return Companions({name: path for name, path in found.files.items() if is_licence(name)}, (), (), ())
    return found


def _read_by(flow: Flow) -> list[tuple[str, Path]]:
    """(description, path) of everything on disk that the plan reads."""
    kept = ((name, o.path) for name, o in flow.origins.items() if isinstance(o, Checkpoint | SafetensorsFile))
    return [(f"the {name}", path) for name, path in kept]


def _resume_key(plan: Plan, source: Checkpoint, origins: Mapping[str, ByteSource]) -> str:
    """A hash of the work: the version, the plan, size and mtime of every file of the checkpoints that it reads, and the
    content of artifacts. A staging directory is resumed only where the hash is the same. Artifacts count by content,
    because another run of the same work may have made them again."""
    state: list[object] = [__version__, plan.plan_id, source.resume_state()]
    for name, origin in sorted(origins.items()):
        if isinstance(origin, Checkpoint):
            state.append([name, origin.resume_state()])
        elif isinstance(origin, Overlay | SafetensorsFile):
            state.append([name, fingerprint(origin)])
    return hashlib.sha256(canonical_json(state)).hexdigest()


# -- shards ----------------------------------------------------------------------------------------------------------


def _write_shards(
    plan: Plan, flow: Flow, directory: OutputDirectory, *, jobs: int, part: tuple[int, int] | None
) -> dict[str, Finished]:
    """Write this run's share of the shards. Shards that an earlier run of the same work has finished are kept."""
    share = [s for i, s in enumerate(plan.shards) if part is None or i % part[1] == part[0]]
    old = {s.name: directory.finished(s.name) for s in share}
    missing = sum(s.nbytes for s in share if old[s.name] is None)
    if missing > directory.free_bytes():
        raise OutputError(
            f"{missing} bytes are needed on the disk of OUT, and {directory.free_bytes()} are free",
            hint="Free some space, or choose OUT on another disk. Finished shards are kept.",
        )
    flow.meter.start(total_bytes=sum(i.nbytes for s in share for i in s.items), parts=len(share))
    records: dict[str, Finished] = {}
    groups = list(_groups(share, old))
    threads = max(1, min(jobs, len(groups)))
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="moeconv-kernel")
    writers = ThreadPoolExecutor(threads, thread_name_prefix="moeconv-shard")
    try:
        try:
            write = partial(_write_group, pool=pool, window=-(-jobs // threads), hold=HOLD // threads)
            futures = [writers.submit(write, group, old, flow, directory) for group in groups]
            for future in as_completed(futures):
                records |= future.result()
        except BaseException:
            flow.stop.set()
            raise
        finally:
            writers.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=True, cancel_futures=True)
    except Interrupted as error:  # all workers have stopped, so the number of finished shards is final
        done = sum(directory.finished(s.name) is not None for s in plan.shards)
        error.hint = f"{done} of {len(plan.shards)} shards are kept. Run the same command again to resume."
        raise
    return records


def _groups(share: Sequence[Shard], old: Mapping[str, Finished | None]) -> Iterator[list[Shard]]:
    """Groups of shards that copy the same bytes and are written together, so that the bytes are read once. Most groups
    have one shard. A finished shard is in a group of its own."""
    group: list[Shard] = []
    for shard in share:
        if group and (len(group) == _TOGETHER or old[shard.name] or not shard.copies_the_same(group[0])):
            yield group
            group = []
        group.append(shard)
        if old[shard.name]:
            yield group
            group = []
    if group:
        yield group


def _write_group(
    group: Sequence[Shard], old: Mapping[str, Finished | None], flow: Flow, directory: OutputDirectory, *,
    pool: ThreadPoolExecutor, window: int, hold: int,
) -> dict[str, Finished]:  # fmt: skip
    """Write the shards of a group, or keep the one that an earlier run has finished. Shards that another part of the
    run is writing are skipped."""
    with ExitStack() as stack:
        mine = [shard for shard in group if stack.enter_context(directory.shard_lock(shard.name))]
        if not mine:
            return {}
        before, lead = old[mine[0].name], mine[0]
        staged = directory.staged / lead.name
        if before and source_crc(flow, lead) == before.source_crc and _sha256(staged) == before.sha256:
            flow.meter.advance(sum(i.nbytes for i in lead.items))
            flow.meter.part_done()
            return {lead.name: before}
        writers = []
        for shard in mine:
            directory.forget(shard.name)
            layout = ((s.name, s.dtype, s.shape) for s in shard.layout())
            writer = ShardWriter(directory.staged / shard.name, layout, head=shard.gguf)
            writers.append(stack.enter_context(closing(writer)))
        crc = write_items(flow, mine, writers, pool=pool, window=window, hold=hold)
        records = {}
        for shard, writer in zip(mine, writers, strict=True):
            sha256, size = writer.finish()
            records[shard.name] = Finished(sha256, size, crc)
            directory.mark_finished(shard.name, records[shard.name])
            flow.meter.part_done()
        return records


def _sha256(staged: Path) -> str:
    with output_errors(staged):
        return file_sha256(staged)


# -- the end ---------------------------------------------------------------------------------------------------------


def _complete(
    plan: Plan, source: Checkpoint, companions: Companions, flow: Flow, directory: OutputDirectory,
    records: dict[str, Finished], check: Check | None, describe: Describe | None,
) -> tuple[dict[str, str], Findings, bool]:  # fmt: skip
    """When every shard is there: write config, index, companions and manifest, check everything, and commit.

    Returns (hex sha256 of each file, what `check` found, whether OUT is complete).
    """
    with directory.commit_lock() as open_for_commit:
        if not open_for_commit:  # another part has committed while this one waited
            return {}, {}, True
        for shard in plan.shards:
            record = records.get(shard.name) or directory.finished(shard.name)
            if record is None:
                if superseded := directory.superseded():
                    directory.discard()
                return {name: r.sha256 for name, r in records.items()}, {}, superseded
            records[shard.name] = record
        files = {name: {"sha256": r.sha256, "bytes": r.bytes} for name, r in records.items()}
        for name, data in small_files(plan, companions):
            write_file(directory.staged / name, data)
            files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest = manifest_of(plan, source, files)
        write_file(directory.staged / MANIFEST_NAME, json_bytes(manifest))
        _remove_leftovers(directory, {*files, MANIFEST_NAME})
        check_written(plan, directory.staged)
        extra: Findings = {}
        if check is not None:
            flow.meter.note("checking the staged model against the source")
            with phase("check"):
                extra = check(directory.staged)
        for name, data in (describe(manifest["steps"], extra) if describe else {}).items():
            write_file(directory.staged / name, data)
        directory.commit()
        return {name: str(entry["sha256"]) for name, entry in sorted(files.items())}, extra, True


def _remove_leftovers(directory: OutputDirectory, expected: set[str]) -> None:
    """Remove what an interrupted run has left: a companion that the source no longer has, or the old OUT after a
    swap."""
    folders = {os.path.dirname(name) for name in expected} - {""}
    for folder in ("", *folders):
        for entry in os.scandir(directory.staged / folder):
            name = os.path.join(folder, entry.name)
            with output_errors(entry.path):
                if entry.is_dir(follow_symlinks=False) and name not in folders:
                    shutil.rmtree(entry.path)
                elif not entry.is_dir(follow_symlinks=False) and name not in expected:
                    os.unlink(entry.path)
