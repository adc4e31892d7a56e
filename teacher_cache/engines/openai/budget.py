"""What answers cost, and whether another request fits into the budget."""

from __future__ import annotations

from dpkd.teacher_cache.engines.engine import EndpointOptions


class Budget:
    """What answers cost, and whether another request may be sent."""

    def __init__(self, endpoint: EndpointOptions) -> None:
        self._endpoint = endpoint
        self.spent = 0.0
        self._reserved: dict[int, float] = {}

    def cost(self, prompt_tokens: int, answered_tokens: int) -> float:
        """Cost of a request, in the currency of the prices."""
        return (prompt_tokens * self._endpoint.price_in + answered_tokens * self._endpoint.price_out) / 1e6

    def allows(self, most: float) -> bool:
        """Whether a request that costs `most` stays within the limit, whatever those in flight will cost."""
        limit = self._endpoint.max_cost
        return limit is None or self.spent + sum(self._reserved.values()) + most <= limit

    def reserve(self, index: int, most: float) -> None:
        """A request is sent that may cost `most`."""
        self._reserved[index] = most

    def settle(self, index: int, cost: float) -> None:
        """The request is answered and cost `cost`, or failed and cost nothing."""
        self._reserved.pop(index, None)
        self.spent += cost
