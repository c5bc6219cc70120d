"""`make show-<paper> ROW=x`: what a row is: claim, baseline, composed configuration, hash, evidence, commands."""

from omegaconf import OmegaConf

from shared.claims.compose import row_config
from shared.claims.ledger import load_ledger
from shared.claims.protocol import Paper
from shared.claims.reproduce import command_of, evidence_of
from shared.metrics.names import load_names
from shared.training.config import hash_of


def claim_lines(paper: Paper, row: str) -> list[str]:
    """Return what the ledger says of a row: the claim, or what a row of our own measures."""
    ledger = load_ledger(paper.root, paper.name)
    for model in ledger.Models:
        claim = model.Claim
        if row in [config.rsplit("/", 1)[-1].removesuffix(".yaml") for config in model.configs]:
            printed = ", ".join(f"{key} {getattr(v, 'text', v)}" for key, v in claim.Metrics.items())
            source = claim.Source
            return [
                f"claim: {claim.Row} ({source.paper}, {source.table}, {source.row})",
                f"paper: {printed}; baseline {claim.Baseline.name or 'none'}",
                f"status: {claim.Status}; {claim.Why}",
            ]
    own = next(own for own in ledger.own_rows if own.Row == row)
    labels = ", ".join(load_names().metrics[name].label for name in own.Metrics)
    return [
        f"own row: {own.Label} ({own.Group})",
        f"measures: {labels}; compared with {', '.join(own.Baseline) or 'nothing'}",
    ]


def show_row(paper: Paper, row: str, seed: int, overrides: list[str]) -> str:
    """Return the description of a row and seed, its composed configuration last; UserError for an unknown row."""
    cfg = row_config(paper, row, seed, overrides)
    evidence, state = evidence_of(paper, cfg)
    lines = [
        f"{paper.name} row {row}, seed {seed}, scale {cfg.scale.name}, variant {cfg.variant}",
        *claim_lines(paper, row),
        f"hash: {hash_of(cfg)[0]}",
        f"evidence: {state} ({evidence})",
        f"devices: {cfg.trainer.devices * cfg.trainer.num_nodes}",
        f"cost: `make reproduce-{paper.name} SCALE={cfg.scale.name} ROWS={row}` prints it before it runs anything",
        f"command: {command_of(paper, row, seed, overrides)}",
        "",
        OmegaConf.to_yaml(cfg, resolve=True).rstrip(),
    ]
    return "\n".join(lines)
