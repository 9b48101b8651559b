"""Made-up people, each another: names, phones and addresses that no two share."""

from __future__ import annotations

import itertools
import random
from typing import Any

_FAMILY = "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜"
_GIVEN = "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超霞平刚桂英华玉萍红建文辉力"
_PLACES = "星辰远航华创云图智联恒信海纳天合瑞丰博雅"
_TRADES = ("科技有限公司", "软件有限公司", "制造有限公司", "金融服务有限公司", "贸易有限公司")
_INDUSTRIES = ("软件", "制造业", "金融", "互联网", "餐饮", "教育")
_TITLES = ("总经理", "采购经理", "技术总监", "工程师")


class People:
    """Gives people one after the other; the same ones for the same seed.

    Args:
        seed: of the choices, and part of every phone number: two crowds with different seeds below 100 share nobody.
    """

    def __init__(self, seed: int) -> None:
        self._rng, self._seed, self._numbers = random.Random(seed), seed, itertools.count(1)

    def lead(self, **more: Any) -> dict[str, Any]:
        """The fields of a lead, for JSON."""
        rng, number = self._rng, next(self._numbers)
        phone = f"1{rng.choice('35789')}{self._seed % 100:02d}{number:07d}"
        name = rng.choice(_FAMILY) + "".join(rng.choices(_GIVEN, k=rng.choice((1, 2))))
        made: dict[str, Any] = {
            "name": name,
            "phone": f"{phone[:3]} {phone[3:7]} {phone[7:]}" if rng.random() < 0.3 else phone,
            "email": f"p{self._seed}.{number}@example.com",
            "company": "".join(rng.sample(_PLACES, 2)) + rng.choice(_TRADES),
            "industry": rng.choice(_INDUSTRIES),
            "title": rng.choice(_TITLES),
            "facts": {"budget": rng.choice((20_000, 120_000, 600_000)), "employees": rng.choice((20, 250, 800))},
        }
        return {**made, **more}


# What somebody is like who fits best.
FITTING: dict[str, Any] = {"industry": "软件", "title": "总经理", "facts": {"budget": 600_000, "employees": 800}}
# Behaviours that together lift anybody who fits above 80 points.
EAGER: tuple[dict[str, Any], ...] = (
    {"kind": "page_viewed", "object": "/pricing"},
    {"kind": "page_viewed", "object": "/pricing"},
    {"kind": "content_downloaded", "object": "白皮书"},
    {"kind": "email_opened"},
    {"kind": "email_opened"},
    {"kind": "email_opened"},
    {"kind": "email_opened"},
    {"kind": "call_answered", "duration_seconds": 420.0},
    {"kind": "call_answered", "duration_seconds": 400.0},
    {"kind": "demo_attended"},
    {"kind": "demo_attended"},
    {"kind": "contract_template_viewed"},
)
