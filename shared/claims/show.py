"""`make show-<paper> ROW=x`: what a row is: claim, baseline, composed configuration, hash, evidence, cost, command."""

from omegaconf import OmegaConf

from shared.claims.compose import row_config, row_overrides
from shared.claims.evidence import Evidence
from shared.claims.ledger import Ledger
from shared.claims.protocol import Paper
from shared.commands import format_duration
from shared.errors import UserError
from shared.metrics.names import load_names
from shared.training.config import hash_of


def claim_lines(ledger: Ledger, row: str) -> list[str]:
    """Return what the ledger says of a row: the claim, or what a row of our own measures."""
    for model in ledger.Models:
        claim, source = model.Claim, model.Claim.Source
        if row in model.rows:
            printed = ", ".join(f"{key} {value}" for key, value in claim.Metrics.items())
            return [
                f"claim: {claim.Row} ({source.paper}, {source.table}, {source.row})",
                f"paper: {printed}; baseline {claim.Baseline.name or 'none'}",
                f"status: {claim.Status}; {claim.Why}",
            ]
    own = next(own for own in ledger.own_rows if own.Row == row)
    labels = ", ".join(load_names().metrics[name].label for name in own.Metrics)
    compared = ", ".join(own.Baseline) or "nothing"
    return [f"own row: {own.Label} ({own.Group})", f"measures: {labels}; compared with {compared}"]


def show_row(paper: Paper, row: str, seed: int, overrides: list[str]) -> str:
    """Return the description of a row and seed, its composed configuration last; UserError for an unknown row."""
    cfg, evidence = row_config(paper, row, seed, overrides), Evidence(paper, overrides)
    path, state = evidence.state(cfg)
    try:
        estimate = f"about {format_duration(paper.seconds_of_run(cfg))}"
    except UserError as error:
        estimate = str(error)
    lines = [
        f"{paper.name} row {row}, seed {seed}, scale {cfg.scale.name}, variant {cfg.variant}",
        *claim_lines(evidence.ledger, row),
        f"hash: {hash_of(cfg)[0]}",
        f"evidence: {state} ({path})",
        f"devices: {cfg.trainer.devices * cfg.trainer.num_nodes}",
        f"cost: {estimate}",
        " ".join(["command: python", *paper.command("train")[1:], *row_overrides(paper, row, seed, overrides)]),
        "",
        OmegaConf.to_yaml(cfg, resolve=True).rstrip(),
    ]
    return "\n".join(lines)
