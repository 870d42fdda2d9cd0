"""`qformers capfilt`: captions written, ranked and kept, shard by shard, until every shard is done."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from qformers.capfilt.candidates import Account
from qformers.capfilt.config import OutputConfig, RankingConfig, SamplingConfig, WorkConfig
from qformers.capfilt.local import run_local, run_processes
from qformers.capfilt.pictures import Pictures
from qformers.capfilt.report import write_capfilt_report
from qformers.capfilt.shards import Shards
from qformers.capfilt.stages import FailedPart, Models, Plan, RankedPart, Span, open_models
from qformers.capfilt.statistics import Statistics, busy_fraction, count_accounts
from qformers.data.config import SourceConfig
from qformers.errors import DataError
from qformers.version import __version__

Parts = Iterator[RankedPart | FailedPart]

logger = logging.getLogger(__name__)


def clean_captions(
    source: SourceConfig,
    captioner: str,
    ranker: str,
    output: OutputConfig,
    sampling: SamplingConfig | None = None,
    ranking: RankingConfig | None = None,
    work: WorkConfig | None = None,
) -> Statistics:
    """CapFilt as BLIP-2 uses it (section 3.3): captions of every picture of `source`, ranked with those it came with.

    Shards that are done are not done again, so the same call goes on after a kill; the folder's bytes depend on the
    pictures, the models and the settings of `output`, `sampling` and `ranking` alone. `shards.py` says what it holds.

    Raises:
        ConfigError, CheckpointError: a model or a setting cannot be used, or the folder is another run's.
        DataError: the source cannot be read, the ranker's scores are not finite, or a shard failed `attempts` times.
    """
    sampling, ranking, work = sampling or SamplingConfig(), ranking or RankingConfig(), work or WorkConfig()
    pictures = Pictures(source)
    devices = work.devices or _devices()
    alone = work.engine == "local" and len(devices) == 1
    # Every process opens its own models; here they say who they are, and that they can be used.
    models = open_models(captioner, ranker, sampling, ranking.judge, devices[0] if alone else "cpu")
    threads = work.threads or max(1, (os.cpu_count() or 1) // (2 * len(devices)))
    plan = _plan(source, pictures, models, captioner, ranker, output, sampling, ranking, work.batch_size, threads)
    if output.shard_format == "jsonl":
        _check_paths(source, pictures)
    settings = _settings(plan, pictures, models, output)
    folder, count = Path(output.output), -(-len(pictures) // output.shard_pictures)
    with Shards.opened(folder, settings, count) as shards:
        start, spans = time.monotonic(), list[Span]()
        failed: dict[int, str] = {}
        for _ in range(work.attempts):
            if not (pending := shards.pending()):
                break
            if len(pending) < count:
                logger.info("%d of %d shards are done: going on with %d", count - len(pending), count, len(pending))
            failed = {}
            if alone:
                parts = run_local(plan, pictures, models, pending, work.readers)
            elif work.engine == "local":
                parts = run_processes(plan, devices, pending, work.readers)
            else:
                from qformers.capfilt.ray_engine import run_ray

                parts = run_ray(plan, pending, work)
            _write(parts, plan, pending, shards, pictures, spans, failed)
        _check_done(shards, plan, failed, work.attempts)
        statistics = count_accounts(shards.accounts(), busy_fraction(spans), time.monotonic() - start)
        file = folder / "statistics.json"
        if not spans and file.exists():  # nothing was left to do: what is known of the time stays
            before = json.loads(file.read_text(encoding="utf-8"))
            known = {name: before[name] for name in ("captioner_busy_fraction", "seconds")}
            statistics = replace(statistics, **known)
        file.write_text(json.dumps(statistics.as_dict(), indent=2) + "\n", encoding="utf-8")
        write_capfilt_report(folder, statistics, settings, shards.accounts(), pictures)
    return statistics


def _write(
    parts: Parts,
    plan: Plan,
    pending: list[int],
    shards: Shards,
    pictures: Pictures,
    spans: list[Span],
    failed: dict[int, str],
) -> None:
    """Each shard written when all of its parts are there; why a shard has failed goes into `failed`."""
    missing = {shard: set(plan.keys(shard)) for shard in pending}
    accounts: dict[int, list[Account]] = {shard: [] for shard in pending}
    total = sum(map(len, missing.values()))
    for part in track(parts, "cleaning captions", total, console=Console(stderr=True), transient=True):
        shard = part.key[0]
        if isinstance(part, FailedPart):
            if part.error is not None:
                raise part.error
            failed[shard] = part.reason
            logger.warning("shard %d failed: %s", shard, part.reason)
            continue
        spans.append(part.span)
        if part.key not in missing[shard]:
            continue  # a worker died after it had been done, and it was done again
        missing[shard].remove(part.key)
        accounts[shard] += part.accounts
        if not missing[shard]:
            done = sorted(accounts.pop(shard), key=lambda account: account.place)
            shards.write(shard, done, pictures.content)


def _check_done(shards: Shards, plan: Plan, failed: dict[int, str], attempts: int) -> None:
    if not (pending := shards.pending()):
        return
    shard = pending[0]
    first = shard * plan.shard_pictures
    last = min(first + plan.shard_pictures, plan.pictures) - 1
    reason = failed.get(shard, "the process that worked on it died")
    raise DataError(
        f"{shards.folder}: {len(pending)} of {shards.count} shards failed {attempts} times: "
        f"{', '.join(map(str, pending[:10]))}; shard {shard} (pictures {first} to {last}): {reason}; "
        "the others are done, and the same command tries these again"
    )


def _plan(
    source: SourceConfig,
    pictures: Pictures,
    models: Models,
    captioner: str,
    ranker: str,
    output: OutputConfig,
    sampling: SamplingConfig,
    ranking: RankingConfig,
    batch_size: int,
    threads: int,
) -> Plan:
    others = [model.encoder_key for model in models.all[1:]]
    return Plan(
        source=source,
        captioner=captioner,
        ranker=ranker,
        sampling=sampling,
        ranking=ranking,
        threads=threads,
        pictures=len(pictures),
        shard_pictures=output.shard_pictures,
        batch_size=batch_size,
        transforms={model.encoder_key: model.transform for model in models.all},
        reused=models.captioner.encoder_key in others,
    )


def _settings(plan: Plan, pictures: Pictures, models: Models, output: OutputConfig) -> dict[str, Any]:
    """All that the output depends on: capfilt.json. Its paths are for people, fingerprints stand for the models."""
    return {
        "qformers_version": __version__,
        "captioner": plan.captioner,
        "ranker": plan.ranker,
        "judge": plan.ranking.judge,
        "captioner_weights": models.captioner.fingerprint,
        "ranker_weights": models.ranker.fingerprint,
        "judge_weights": None if models.judge is None else models.judge.fingerprint,
        "source": asdict(plan.source) | {"path": os.path.abspath(plan.source.path)},
        "records": _records_fingerprint(pictures),
        "pictures": plan.pictures,
        "shard_format": output.shard_format,
        "shard_pictures": output.shard_pictures,
        **asdict(plan.sampling),
        **{name: value for name, value in asdict(plan.ranking).items() if name != "judge"},
    }


def _records_fingerprint(pictures: Pictures) -> str:
    """sha256 of all names, ids and captions; the pictures' own bytes would take as long as reading them."""
    digest = hashlib.sha256()
    words = pictures.records.select_columns(["name", "image_id", "captions"])
    for batch in words.iter(batch_size=1000):
        digest.update(json.dumps(batch, ensure_ascii=False).encode())
    return digest.hexdigest()


def _check_paths(source: SourceConfig, pictures: Pictures) -> None:
    facts, _ = pictures.read(0)
    if not facts.path:
        raise DataError(
            f"{source.path}: its pictures are inside its own files, which lines of JSON cannot name: "
            "add --shard_format webdataset"
        )


def _devices() -> list[str]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
