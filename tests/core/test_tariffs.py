"""Prices: a site's own figure comes before the table's, one at a time, and no figure is made up."""

import pytest

from coordinator.core import gpu_types, tariffs
from coordinator.core.tariffs import Prices, Tariff


@pytest.mark.parametrize("known", gpu_types.TYPES, ids=lambda known: known.key)
def test_the_table_is_of_the_types_that_are_known(known: gpu_types.GpuType) -> None:
    found = tariffs.public(known.key)
    assert found.burst_usd == known.usd_per_hour
    assert (found.lease_usd is None) == (found.burst_usd is None)
    if found.lease_usd is not None and found.burst_usd is not None:
        assert found.lease_usd < found.burst_usd
    assert found.owned_usd is None, "what an own GPU costs is nobody's but its owner's to say"


def test_every_figure_is_of_a_type() -> None:
    keys = {known.key for known in gpu_types.TYPES}
    assert set(tariffs._LOADED_WATTS) <= keys


def test_a_name_of_the_driver_is_found_and_an_unknown_type_has_no_price() -> None:
    assert tariffs.public("NVIDIA H100 80GB HBM3") == tariffs.public("H100")
    assert tariffs.public("A100 40GB").burst_usd == 1.99
    assert tariffs.public("Frobnicator 9000") == Tariff()


def test_what_is_configured_replaces_one_figure() -> None:
    prices = Prices({"H100": Tariff(lease_usd=1.5, owned_usd=0.8)})
    table = tariffs.public("H100")
    found = prices.of("H100")
    assert (found.lease_usd, found.owned_usd) == (1.5, 0.8)
    assert (found.burst_usd, found.loaded_watts) == (table.burst_usd, table.loaded_watts)
    assert prices.source("H100") == tariffs.CONFIGURED
    assert prices.source("L4") == tariffs.SOURCE
    assert prices.of("L4") == tariffs.public("L4")
