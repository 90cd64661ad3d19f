"""The numbered videos of tests/data, and the shards packed from them."""

from tests.data.conftest import packed, videos  # noqa: F401
