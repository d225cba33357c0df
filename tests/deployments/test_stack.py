"""The whole stack, as a team uses it: servers, a worker, flow runs that come from deployments."""

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.prefect]
