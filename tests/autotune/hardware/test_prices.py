from pathlib import Path

import pytest

from autotune.errors import BadInput
from autotune.hardware.catalogue import load_catalogue
from autotune.hardware.price import Price
from autotune.hardware.prices import parse_prices, price_of


def test_prices_are_given_by_any_name_of_the_gpu() -> None:
    prices = parse_prices(["h100=2.49", "NVIDIA L40S=$1.10", "rtx 4090=0.4"])
    assert prices == {
        "h100-sxm": Price(2.49, 2.49, 2.49, "--price", None),
        "l40s": Price(1.10, 1.10, 1.10, "--price", None),
        "rtx-4090": Price(0.4, 0.4, 0.4, "--price", None),
    }


def test_the_later_price_counts(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("h100: 3\nh200: 4\n")
    prices = parse_prices([str(file), "h100-sxm=2"])
    assert (prices["h100-sxm"].usd_per_hour, prices["h200-sxm"].usd_per_hour) == (2, 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "h100: {price: 2.5, date: 2026-11-01, where: quote 17}\nl4: 0.5\n"),
        ("a.yml", 'h100: {price: "2.5", date: "2026-11-01", where: quote 17}\nl4: 0.5\n'),
        (
            "a.json",
            '{"h100": {"price": 2.5, "date": "2026-11-01", "where": "quote 17"}, "l4": 0.5}',
        ),
        ("a.csv", "gpu,price,date,where\nh100,2.5,2026-11-01,quote 17\nl4,0.5,,\n"),
        ("b.csv", "\ufeffPrice, Name ,where,date\n$2.5,h100,quote 17,2026-11-01\n0.5,l4,,\n"),
        ("prices=mine", "h100: {price: 2.5, date: 2026-11-01, where: quote 17}\nl4: 0.5\n"),
    ],
)
def test_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert parse_prices([str(path)]) == {
        "h100-sxm": Price(2.5, 2.5, 2.5, "quote 17", "2026-11-01"),
        "l4": Price(0.5, 0.5, 0.5, str(path), None),
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("h100", "give GPU=PRICE"),
        ("", "give GPU=PRICE"),
        ("=2.49", "give GPU=PRICE"),
        ("h10=2.49", "the nearest names are h100"),
        ("h100=", "is no price"),
        ("h100=cheap", "'cheap' is no price"),
        ("h100=0", "above 0"),
        ("h100=-2", "above 0"),
        ("h100=nan", "is no price"),
        ("h100=inf", "is no price"),
        ("h100=1e400", "is no price"),
        ("h100=24900", "at most 1000"),
        ("h100=2,49", "'2,49' is no price"),
        ("\0", "give GPU=PRICE"),
        ("nowhere.yaml", "nowhere.yaml does not exist"),
        ("nowhere.csv", "nowhere.csv does not exist"),
        ("nowhere.json", "nowhere.json does not exist"),
    ],
)
def test_what_is_no_price_is_refused(text: str, told: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_prices([text])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "", "no prices"),
        ("a.yaml", "- h100\n", "top level"),
        ("a.yaml", "h100: [2]\n", "is no price"),
        ("a.yaml", "h100: true\n", "is no price"),
        ("a.yaml", "h100:\n", "is no price"),
        ("a.yaml", "h100: {cost: 2}\n", "unknown key 'cost'"),
        ("a.yaml", "h100: {where: there}\n", "price is missing"),
        ("a.yaml", "h100: {price: 2, date: yesterday}\n", "YYYY-MM-DD"),
        ("a.yaml", "h100: 2\nh100: 3\n", "given twice"),
        ("a.yaml", "h100: 2\nh100-sxm: 3\n", "given twice"),
        ("a.yaml", "h10: 2\n", "nearest names"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "expected one object"),
        ("a.json", '{"h100": 1, "h100": 2}', "given twice"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.csv", "gpu,price\n", "no prices"),
        ("a.csv", "model,price\nh100,2\n", "line 2"),
        ("a.csv", "gpu,price\nh100,2\nh100,3\n", "line 3"),
        ("a.csv", "gpu,price\nh100\n", "line 2"),
        ("a.csv", "gpu,price,colour\nh100,2,red\n", "unknown key 'colour'"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        parse_prices([str(path)])
    assert told in str(error.value)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="cannot be read"):
        parse_prices([str(path)])


def test_the_user_s_price_comes_before_the_catalogue_s() -> None:
    catalogue = load_catalogue()
    h100, a30 = catalogue.find("h100"), catalogue.find("a30")
    assert price_of(h100) == h100.price
    assert price_of(h100, parse_prices(["h100=2"])).usd_per_hour == 2
    assert price_of(h100, parse_prices(["h200=2"])) == h100.price
    assert a30.price is None
    with pytest.raises(BadInput, match=r"--price a30=USD_PER_HOUR"):
        price_of(a30, {})
    assert price_of(a30, parse_prices(["a30=0.6"])).usd_per_hour == 0.6
