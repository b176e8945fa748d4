"""What keeping a tensor's sites in float would buy, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from quantempo.contracts.plan import Keep, QuantPlan
from quantempo.contracts.table import ScaleTable
from quantempo.progress import Advance
from quantempo.quality import Images
from quantempo.report.analysis import TensorNoise
from quantempo.report.measure import Fidelity, ReportOptions, Sampler, Subject, session_with_table


@dataclass(frozen=True)
class Gain:
    """The sites of one tensor, and by how much PSNR rises when they compute in float.

    Args:
        gain_db: against the bundle as it is, same seeds.
    """

    sites: tuple[str, ...]
    mean_sqnr_db: float
    gain_db: float


def without(plan: QuantPlan, tensor: str) -> QuantPlan:
    """The plan with all sites that read a tensor kept in float."""
    decisions = dict(plan.decisions)
    for site in plan.quantized():
        if site.tensor == tensor:
            decisions[site.id] = Keep("tried in float")
    return dataclasses.replace(
        plan, decisions=decisions, centred=tuple(name for name in plan.centred if name != tensor)
    )


def measure_gains(
    subject: Subject,
    table: ScaleTable,
    worst: Sequence[TensorNoise],
    reference: Images,
    options: ReportOptions,
    advance: Advance,
) -> tuple[Gain, ...]:
    """Sample once as it is and once per tensor with its sites in float; the largest gain first.

    Args:
        subject: the bundle.
        table: its scales.
        worst: the tensors to try.
        reference: float images of the first seeds at the headline guidance; as many are sampled.
        options: guidance, steps and threads.
        advance: told after each tensor.
    """
    base = _psnr_db(subject, subject.plan, table, reference, options)
    gains = []
    for done, noise in enumerate(worst):
        advance(done, len(worst))
        plan = without(subject.plan, noise.tensor)
        if not plan.quantized():
            continue
        names = plan.scaled_tensors()
        scales = ScaleTable(table.partition, {name: table.of(name) for name in names})
        value = _psnr_db(subject, plan, scales, reference, options)
        gains.append(Gain(noise.sites, sum(noise.sqnr_db) / len(noise.sqnr_db), value - base))
    return tuple(sorted(gains, key=lambda gain: -gain.gain_db))


def _psnr_db(
    subject: Subject, plan: QuantPlan, table: ScaleTable, reference: Images, options: ReportOptions
) -> float:
    with session_with_table(dataclasses.replace(subject, plan=plan), table, options) as session:
        images = Sampler(session, options).images(len(reference), options.guidance[0])
    return Fidelity.of(images, reference).psnr_db
