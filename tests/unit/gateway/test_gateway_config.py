"""What a gateway can be told."""

import pytest
from pydantic import ValidationError

from services.gateway.config import GatewaySettings


def test_requests_are_of_the_default_tenant_unless_told_otherwise() -> None:
    assert GatewaySettings().tenant == "default"
    assert GatewaySettings(tenant="acme-1.eu_west").tenant == "acme-1.eu_west"


@pytest.mark.parametrize("tenant", ["", "a b", "a/b", "ä", "x" * 65, "a\n"])
def test_a_tenant_that_the_adapter_store_would_refuse_is_refused_at_the_start(tenant: str) -> None:
    with pytest.raises(ValidationError):
        GatewaySettings(tenant=tenant)
