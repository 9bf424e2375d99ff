"""Prices of GPUs: the user's own, given as `h100=2.49` or in a file, before the catalogue's."""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from autotune.deploy.strict_yaml import read_yaml_mapping
from autotune.errors import BadInput
from autotune.hardware.catalogue import Catalogue, Gpu, load_catalogue
from autotune.hardware.price import Price

# No GPU costs that much an hour; who writes more means cents, months or another currency.
MOST_USD_PER_HOUR = 1000.0
_FORMS = "give GPU=PRICE, such as h100=2.49, or a YAML, JSON or CSV file of such prices"


def parse_prices(texts: Iterable[str], catalogue: Catalogue | None = None) -> dict[str, Price]:
    """Prices by the catalogue's names of GPUs; of two for one GPU the later counts.

    Arguments:
        texts: each `NAME=USD`, or the path of a file: YAML or JSON with `name: price` or
            `name: {price, date, where}`, or CSV with the columns gpu and price and, if wanted, date
            and where. USD for one GPU for one hour.
        catalogue: whose names and aliases are meant; the installed one by default.

    Raises:
        BadInput: a text is neither, a file cannot be read, a GPU is unknown, or a price is not a
            number above 0.
    """
    catalogue = load_catalogue() if catalogue is None else catalogue
    prices: dict[str, Price] = {}
    for text in texts:
        path = Path(text)
        name, equals, price = text.rpartition("=")
        if path.suffix.lower() in (".yaml", ".yml", ".json", ".csv") or _is_file(path):
            prices |= _read_file(path, catalogue)
        elif equals and name.strip():
            prices[catalogue.find(name).name] = _given(
                price.strip(), "--price", f"--price {text}", {}
            )
        else:
            raise BadInput(f"--price {text!r}: {_FORMS}")
    return prices


def price_of(gpu: Gpu, overrides: Mapping[str, Price] | None = None) -> Price:
    """What a GPU costs: the user's price, or else the catalogue's example.

    Raises:
        BadInput: neither is known; the message tells how to give one.
    """
    price = (overrides or {}).get(gpu.name, gpu.price)
    if price is None:
        raise BadInput(
            f"no price of {gpu.name} is known: give yours with --price {gpu.name}=USD_PER_HOUR"
        )
    return price


def _read_file(path: Path, catalogue: Catalogue) -> dict[str, Price]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        content = _read_csv(path)
    elif suffix == ".json":
        content = _read_json(path)
    else:
        content = read_yaml_mapping(path)
    if not content:
        raise BadInput(f"{path}: there are no prices in it")
    prices = {}
    for name, entry in content.items():
        place = f"{path}: {name}"
        details = entry if isinstance(entry, dict) else {"price": entry}
        unknown = sorted(map(str, set(details) - {"price", "date", "where"}))
        if unknown or "price" not in details:
            wrong = f"unknown key {unknown[0]!r}" if unknown else "the price is missing"
            raise BadInput(f"{place}: {wrong}; an entry has price and, if wanted, date and where")
        try:
            gpu = catalogue.find(name)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from None
        if gpu.name in prices:
            raise BadInput(f"{place}: the price of {gpu.name} is given twice")
        prices[gpu.name] = _given(details["price"], str(path), place, details)
    return prices


def _read_csv(path: Path) -> dict[str, Any]:
    rows = list(csv.DictReader(_text(path).splitlines()))
    content: dict[str, Any] = {}
    for number, row in enumerate(rows, start=2):
        cells = {(k or "").strip().lower(): (v or "").strip() for k, v in row.items() if k}
        name = cells.pop("gpu", "") or cells.pop("name", "")
        if not name or not cells.get("price"):
            raise BadInput(f"{path}, line {number}: the columns gpu and price are needed")
        if name in content:
            raise BadInput(f"{path}, line {number}: the price of {name} is given twice")
        content[name] = {k: v for k, v in cells.items() if v}
    return content


def _read_json(path: Path) -> dict[str, Any]:
    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise BadInput(f"{path}: {twice[0]} is given twice")
        return dict(pairs)

    try:
        content = json.loads(_text(path), object_pairs_hook=refuse_twice)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f'{path}: expected one object such as {{"h100": 2.49}}')
    return content


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"--price: {path} does not exist; {_FORMS}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--price: {path} cannot be read: {error}") from error


def _given(value: Any, where: str, place: str, details: Mapping[str, Any]) -> Price:
    """A price as the user wrote it; `place` says where for the message."""
    usd = _number(value)
    if usd is None or not 0 < usd <= MOST_USD_PER_HOUR:
        raise BadInput(
            f"{place}: {value!r} is no price: give US dollars for one GPU for one hour, above 0 "
            f"and at most {MOST_USD_PER_HOUR:g}"
        )
    return Price(usd, usd, usd, str(details.get("where") or where), _date(details, place))


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value.strip().removeprefix("$") if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _date(details: Mapping[str, Any], place: str) -> str | None:
    date = details.get("date")
    if date is None:
        return None
    try:  # YAML reads 2026-11-20 as a date already
        return datetime.date.fromisoformat(str(date)).isoformat()
    except ValueError:
        raise BadInput(f"{place}: the date {date!r} is not of the form YYYY-MM-DD") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a path, or with a zero byte
        return False
