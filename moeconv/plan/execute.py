"""The only loop: applies a Plan, whatever verb made it. Stage, write shards, check the promises, commit.

Same plan, same bytes: for any number of workers, any order, and any point at which a run was cut off and resumed.
"""

from __future__ import annotations

import hashlib
import json
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
from typing import Any

from moeconv import __version__
from moeconv.checkpoint.companions import Companions, find_companions, is_licence
from moeconv.checkpoint.gguf import written_tensors
from moeconv.checkpoint.hashes import file_sha256
from moeconv.checkpoint.output import Finished, OutputDirectory
from moeconv.checkpoint.overlay import Overlay
from moeconv.checkpoint.reader import INDEX_NAME, MANIFEST_NAME, Checkpoint
from moeconv.checkpoint.safetensors_file import SafetensorsFile
from moeconv.checkpoint.staging import StagingLock
from moeconv.checkpoint.strictjson import canonical_json
from moeconv.checkpoint.target import check_target
from moeconv.checkpoint.writer import ShardWriter, output_errors, write_file
from moeconv.errors import CheckError, InputError, Interrupted, LimitError, OutputError, UsageError, escape
from moeconv.plan.flow import HOLD, ByteSource, Flow, source_crc, write_items
from moeconv.plan.limits import check_limits
from moeconv.plan.memory import lean_malloc
from moeconv.plan.meter import Meter, SilentMeter
from moeconv.plan.overlay import fingerprint
from moeconv.plan.plan import Plan, Shard

_READ = 1 << 22
_FAN = 8  # files written at a time from one buffer: each has a write buffer of its own

Describe = Callable[[list[dict[str, Any]], Mapping[str, Any]], Mapping[str, bytes]]


@dataclass(frozen=True)
class Result:
    """What a step did, in the words of the JSON contract. `extra` is what `check` found."""

    output: str
    complete: bool
    files: Mapping[str, str]
    seconds: float
    peak_rss_bytes: int
    warnings: list[str]
    extra: Mapping[str, Any] = field(default_factory=dict)


def default_jobs() -> int:
    """Workers when --jobs is not given: the processors this process may use, at most 4."""
    return min(4, len(os.sched_getaffinity(0)))


def checked_jobs(jobs: int | None) -> int:
    """The workers of a run. Raises UsageError for none of them."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs} must be at least 1", hint="Leave it out for one per processor, at most 4.")
    return default_jobs() if jobs is None else jobs


def peak_rss_bytes() -> int:
    """The most memory this process has held, in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    # counts what a large parent held when it forked us, so only where /proc is missing
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
        raise UsageError(f"--part {escape(text)} is not i/n with 0 <= i < n", hint="For four runs: 0/4, 1/4, 2/4, 3/4.")
    return i, n


def execute(
    plan: Plan,
    *,
    source: Checkpoint,
    out: str | os.PathLike[str],
    origins: Mapping[str, ByteSource] | None = None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
    describe: Describe | None = None,
    jobs: int | None = None,
    part: tuple[int, int] | None = None,
    overwrite: bool = False,
    strict: bool = False,
    meter: Meter | None = None,
    lock: StagingLock | None = None,
) -> Result:
    """Write the checkpoint that `plan` describes to the directory `out`.

    `origins` are byte sources beside "source" that the plan's inputs name. `lock` is a hold on OUT's staging directory
    that the caller has taken already. `check` sees the staged directory before it
    is committed; what it returns lands in the result, and an error of its own keeps OUT from being written. `describe`
    turns the manifest's steps and what `check` found into files for people, which the manifest does not name.
    Raises InputError, OutputError, CheckError or Interrupted; OUT is then as it was before.
    """
    began = time.monotonic()
    lean_malloc()
    out = Path(os.path.abspath(out))
    meter = meter or SilentMeter()
    flow = Flow({"source": source, **(origins or {})}, meter, strict)
    jobs = checked_jobs(jobs)
    companions = companions_of(plan, source)  # now, not when hours of work are done
    check_target(out, reads=_read_by(flow), overwrite=overwrite)
    check_limits(plan)
    key = _resume_key(plan, source, origins or {})
    with OutputDirectory(out, key=key, overwrite=overwrite, shared=part is not None, lock=lock) as directory:
        try:
            records = _write_shards(plan, flow, directory, jobs=jobs, part=part)
            files, extra, complete = _complete(plan, source, companions, flow, directory, records, check, describe)
        except LimitError:  # of a file that is read, or that the check reads: what is written may be good
            raise
        except (InputError, CheckError):
            directory.discard()
            raise
    warnings = [*companions.warnings, *sorted(flow.warnings)]
    return Result(str(out), complete, files, time.monotonic() - began, peak_rss_bytes(), warnings, extra)


def companions_of(plan: Plan, source: Checkpoint) -> Companions:
    """The files beside the source's shards that are copied to the output of `plan`. Raises InputError."""
    found = find_companions(source, plan.config, made=plan.texts)
    if plan.gguf:  # config and tokenizer are inside
        return Companions({name: path for name, path in found.files.items() if is_licence(name)}, (), (), ())
    return found


def _read_by(flow: Flow) -> list[tuple[str, Path]]:
    """(what it is, its path) of everything on disk that the plan reads."""
    kept = ((name, o.path) for name, o in flow.origins.items() if isinstance(o, Checkpoint | SafetensorsFile))
    return [(f"the {name}", path) for name, path in kept]


def _resume_key(plan: Plan, source: Checkpoint, origins: Mapping[str, ByteSource]) -> str:
    """Names the exact work: the plan, the version, size and mtime of every file of a checkpoint that it reads, and the
    content of artifacts, which another run of the same work may have made again."""
    state: list[Any] = [__version__, plan.plan_id, source.resume_state()]
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
    """Write this run's share of the shards, reusing those that an earlier run of the same work finished."""
    share = [s for i, s in enumerate(plan.shards) if part is None or i % part[1] == part[0]]
    old = {s.name: directory.finished(s.name) for s in share}
    missing = sum(s.nbytes for s in share if old[s.name] is None)
    if missing > directory.free_bytes():
        raise OutputError(
            f"{missing} bytes are needed, {directory.free_bytes()} are free",
            hint="Free some space, or give OUT on another disk. What is finished is kept.",
        )
    flow.meter.start(total_bytes=sum(i.nbytes for s in share for i in s.items), parts=len(share))
    records: dict[str, Finished] = {}
    fans = list(_fans(share, old))
    threads = max(1, min(jobs, len(fans)))
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="moeconv-kernel")
    writers = ThreadPoolExecutor(threads, thread_name_prefix="moeconv-shard")
    try:
        try:
            write = partial(_write_fan, pool=pool, window=-(-jobs // threads), hold=HOLD // threads)
            futures = [writers.submit(write, fan, old, flow, directory) for fan in fans]
            for future in as_completed(futures):
                records |= future.result()
        except BaseException:
            flow.stop.set()
            raise
        finally:
            writers.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=True, cancel_futures=True)
    except Interrupted as error:  # counted when no worker finishes another one
        done = sum(directory.finished(s.name) is not None for s in plan.shards)
        error.hint = f"{done} of {len(plan.shards)} shards are kept: run the same command again to resume."
        raise
    return records


def _fans(share: Sequence[Shard], old: Mapping[str, Finished | None]) -> Iterator[list[Shard]]:
    """Shards that are written together because they are copies of the same bytes; most shards stand alone."""
    fan: list[Shard] = []
    for shard in share:
        if fan and (len(fan) == _FAN or old[shard.name] or not shard.is_twin(fan[0])):
            yield fan
            fan = []
        fan.append(shard)
        if old[shard.name]:
            yield fan
            fan = []
    if fan:
        yield fan


def _write_fan(
    fan: Sequence[Shard], old: Mapping[str, Finished | None], flow: Flow, directory: OutputDirectory, *,
    pool: ThreadPoolExecutor, window: int, hold: int,
) -> dict[str, Finished]:  # fmt: skip
    """Write the shards of a fan, or keep the one that an earlier run finished; those that another part has are left."""
    with ExitStack() as stack:
        mine = [shard for shard in fan if stack.enter_context(directory.shard_lock(shard.name))]
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
    records: dict[str, Finished], check: Callable[[Path], Mapping[str, Any]] | None, describe: Describe | None,
) -> tuple[dict[str, str], Mapping[str, Any], bool]:  # fmt: skip
    """When every shard is there: write config, index, companions and manifest, check, commit."""
    with directory.commit_lock() as open_for_commit:
        if not open_for_commit:  # another part committed while this one waited
            return {}, {}, True
        for shard in plan.shards:
            record = records.get(shard.name) or directory.finished(shard.name)
            if record is None:
                if part_came_late := directory.superseded():
                    directory.discard()
                return {name: r.sha256 for name, r in records.items()}, {}, part_came_late
            records[shard.name] = record
        files = {name: {"sha256": r.sha256, "bytes": r.bytes} for name, r in records.items()}
        for name, data in _small_files(plan, companions):
            write_file(directory.staged / name, data)
            files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest = _manifest(plan, source, files)
        write_file(directory.staged / MANIFEST_NAME, _json(manifest))
        _remove_strangers(directory, {*files, MANIFEST_NAME})
        _check_promises(plan, directory.staged)
        extra: Mapping[str, Any] = {}
        if check is not None:
            flow.meter.note("checking the staged model against the source")
            extra = check(directory.staged)
        for name, data in (describe(manifest["steps"], extra) if describe else {}).items():
            write_file(directory.staged / name, data)
        directory.commit()
        return {name: str(entry["sha256"]) for name, entry in sorted(files.items())}, extra, True


def _json(value: Any, *, constants: bool = False) -> bytes:
    """`constants`: Infinity and NaN are written as transformers writes and reads them."""
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=constants) + "\n").encode()


def _small_files(plan: Plan, companions: Companions) -> Iterator[tuple[str, bytes]]:
    if plan.gguf:
        yield from companions.read()
        return
    yield "config.json", _json(plan.config, constants=True)
    yield from ((name, text.encode()) for name, text in plan.texts.items())
    if len(plan.shards) > 1:
        weight_map = {spec.name: s.name for s in plan.shards for i in s.items for spec in i.outputs}
        total = sum(item.nbytes for item in plan.items())
        yield INDEX_NAME, _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    yield from companions.read()


def _manifest(plan: Plan, source: Checkpoint, files: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance without times or paths, so that the same plan gives the same manifest everywhere."""
    steps, identity = [], plan.identity
    for done in (*plan.earlier, plan):
        steps.append(
            {
                "moeconv": __version__,
                "command": done.command,
                "parameters": dict(done.parameters),
                "plan_id": done.plan_id,
                "source": identity,
                "changed": dict(sorted(done.changed.items())),
                "total_parameters": done.params_total,
                "active_parameters": done.params_active,
            }
        )
        identity = done.plan_id  # the next one's source was never written
    history = (source.manifest or {}).get("steps", [])
    return {"manifest_version": 1, "steps": [*(history if isinstance(history, list) else []), *steps], "files": files}


def _remove_strangers(directory: OutputDirectory, expected: set[str]) -> None:
    """What a run that was cut off left: a companion that the source no longer has, or the old OUT after a swap."""
    folders = {os.path.dirname(name) for name in expected} - {""}
    for folder in ("", *folders):
        for entry in os.scandir(directory.staged / folder):
            name = os.path.join(folder, entry.name)
            with output_errors(entry.path):
                if entry.is_dir(follow_symlinks=False) and name not in folders:
                    shutil.rmtree(entry.path)
                elif not entry.is_dir(follow_symlinks=False) and name not in expected:
                    os.unlink(entry.path)


def _check_promises(plan: Plan, staged: Path) -> None:
    """Read the written headers back and hold them against the plan, tensor by tensor and role by role."""
    planned = {name: (dtype, shape) for shard in plan.shards for name, dtype, shape in _tensors(shard)}
    try:
        if plan.gguf:
            found = [entry for shard in plan.shards for entry in written_tensors(staged / shard.name)]
        else:
            found = [(name, ref.dtype, ref.shape) for name, ref in Checkpoint(staged).tensors.items()]
    except LimitError as error:  # nothing is wrong with it, so it is not thrown away
        raise OutputError(
            f"the result is whole, and more than moeconv reads: {error.message}",
            hint=f"It stays in {escape(staged)}. A smaller --shard-size spreads it over more files.",
        ) from None
    except InputError as error:
        raise CheckError(f"the written checkpoint does not open: {error.message}") from None
    if set(planned) != {name for name, _, _ in found}:
        raise CheckError(f"{len(found)} tensors were written, the plan says {len(planned)}")
    for name, dtype, shape in found:
        if (dtype, shape) != planned[name]:
            raise CheckError(f"tensor {name!r} was written as {dtype} {list(shape)}, against the plan")
    size = sum((staged / shard.name).stat().st_size for shard in plan.shards)
    if size != plan.nbytes:
        raise CheckError(f"{size} bytes were written, the plan says {plan.nbytes}")
    promised = plan.promise
    if promised and promised != plan.changed:
        raise CheckError(f"the plan promised to change {promised} and changed {plan.changed}")


def _tensors(shard: Shard) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) as the file's own header has them."""
    if shard.gguf is not None:
        yield from ((stack.name, stack.dtype, stack.shape) for stack in shard.gguf.stacks)
    else:
        yield from ((spec.name, spec.dtype, spec.shape) for spec in shard.layout())
