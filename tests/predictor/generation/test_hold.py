"""`Hold` on an event loop, ended by another thread."""

import asyncio
import threading

import pytest

from predictor.errors import ModelNotReady, RateLimited
from predictor.generation.hold import Hold, HoldFull
from predictor.types import Caller

HANG_SECONDS = 60


def test_hold_places_are_sequences_and_are_freed_by_those_who_leave() -> None:
    async def check() -> None:
        hold = Hold(4)
        first, second = (asyncio.create_task(hold.wait(number, HANG_SECONDS)) for number in (3, 1))
        await asyncio.sleep(0)
        assert hold.num_sequences == 4
        with pytest.raises(HoldFull):
            await hold.wait(1, HANG_SECONDS)
        first.cancel()
        await asyncio.wait({first})
        assert hold.num_sequences == 1
        with pytest.raises(TimeoutError):
            await hold.wait(3, 0.001)
        assert hold.num_sequences == 1
        threading.Thread(target=hold.end).start()
        await second
        assert hold.num_sequences == 0
        await hold.wait(100, HANG_SECONDS)

    asyncio.run(asyncio.wait_for(check(), HANG_SECONDS))


def test_hold_filled_by_one_key_keeps_the_share_of_another() -> None:
    alice, bob = Caller("alice", share=0.5), Caller("bob", share=0.5, concurrent_sequences=1)

    async def check() -> None:
        hold = Hold(4)
        tasks = [asyncio.create_task(hold.wait(4, HANG_SECONDS, alice))]
        await asyncio.sleep(0)
        with pytest.raises(HoldFull):
            await hold.wait(1, HANG_SECONDS, alice)
        tasks.append(asyncio.create_task(hold.wait(1, HANG_SECONDS, bob)))
        await asyncio.sleep(0)
        assert hold.num_sequences == 5
        with pytest.raises(RateLimited, match="API key bob has 1 of its 1 concurrent sequences"):
            await hold.wait(1, HANG_SECONDS, bob)
        hold.end()
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(check(), HANG_SECONDS))


def test_hold_ended_with_an_error_raises_it_and_keeps_it() -> None:
    async def check() -> None:
        hold = Hold(4)
        waiting = [asyncio.create_task(hold.wait(1, HANG_SECONDS)) for _ in range(3)]
        await asyncio.sleep(0)
        hold.end(ModelNotReady("broken"))
        hold.end()
        outcomes = await asyncio.gather(*waiting, hold.wait(1, HANG_SECONDS), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["broken"] * 4

    asyncio.run(asyncio.wait_for(check(), HANG_SECONDS))
