"""`kehu token`: a token for calls to a development stack."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kehu.auth import Role, issue_token
from kehu.cli.clock import duration
from kehu.cli.up import StateDir
from kehu.supervisor import STATE, secrets_of


def command(
    role: Annotated[
        list[Role] | None, typer.Option(help="A role; may be given several times. Default: all but system.")
    ] = None,
    subject: Annotated[str, typer.Option(help="Id of the user.")] = "developer",
    ttl: Annotated[str, typer.Option(help="How long it holds, e.g. 12h.")] = "12h",
    state_dir: StateDir = STATE,
) -> None:
    """Print a bearer token, signed with KEHU_JWT_SECRET or else with the secret of the stack in the state directory."""
    secret = os.environ.get("KEHU_JWT_SECRET")
    if secret is None:
        if not (state_dir / "secrets.json").exists():
            sys.stderr.write(f"There are no secrets in {state_dir}: set KEHU_JWT_SECRET, or run `kehu up` first.\n")
            raise typer.Exit(1)
        secret = secrets_of(state_dir)["jwt_secret"]
    roles = role or [known for known in Role if known is not Role.SYSTEM]
    print(issue_token(secret, subject, roles, duration(ttl).total_seconds()))
