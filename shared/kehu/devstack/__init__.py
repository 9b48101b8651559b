"""PostgreSQL and Kafka for tests, the demo and a laptop: given, in Docker, or embedded (docs/how-to/devstack.md)."""

from kehu.devstack.base import DevStackError, Origin, Server
from kehu.devstack.postgres import create_database, database_url, drop_database
from kehu.devstack.stack import Address, DevStack, remove_data

__all__ = [
    "Address",
    "DevStack",
    "DevStackError",
    "Origin",
    "Server",
    "create_database",
    "database_url",
    "drop_database",
    "remove_data",
]
