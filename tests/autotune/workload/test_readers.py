import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.errors import BadInput
from autotune.workload.detect import FORMATS
from autotune.workload.read import read_workload

# From AzureLLMInferenceTrace_conv, Azure Public Dataset, CC-BY 4.0.
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
# From Mooncake's conversation trace, Apache-2.0; the lengths of the lists of ids are kept.
MOONCAKE = (
    '{"timestamp": 0, "input_length": 2290, "output_length": 316, "hash_ids": [0, 42, 43, 44, 45]}'
    '\n{"timestamp": 3000, "input_length": 1000, "output_length": 3, "hash_ids": [0, 46]}\n'
)
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,\
Log Type
5,7,3.1,ChatGPT,472,18,490,Conversation log
6,,0.1,ChatGPT,100,0,100,API log
9.5,8,2.2,GPT-4,1087,230,1317,API log
"""
SHAREGPT = json.dumps(
    [
        {
            "id": "a",
            "conversations": [
                {"from": "system", "value": "be nice"},
                {"from": "human", "value": "What is a quokka, in a word?"},
                {"from": "gpt", "value": "A small marsupial."},
                {"from": "human", "value": "Thanks"},
            ],
        },
        {"id": "b", "conversations": [{"from": "human", "value": "alone"}]},
        {"id": "c", "conversations": []},
    ],
    indent=1,
)
CUSTOM = (
    '{"prompt": "Once upon a time", "output_tokens": 12}\n'
    '{"prompt": "twice"}\n\n'
    '{"prompt_token_ids": [5, 6, 7], "output_len": 4, "session_id": 3}\n'
)
TIMED = (
    '{"timestamp": 0.5, "input_length": 40, "output_length": 5, "hash_ids": ["x", "y", "z"]}\n'
    '{"timestamp": 2.5, "input_length": 20, "output_length": 6, "hash_ids": ["x", "q"]}\n'
)
BATCH = "\n".join(
    json.dumps({"custom_id": str(i), "method": "POST", "url": "/v1/x", "body": body})
    for i, body in enumerate(
        [
            {
                "messages": [
                    {"role": "system", "content": "short"},
                    {"role": "user", "content": [{"type": "text", "text": "hello there"}]},
                ],
                "max_completion_tokens": 9,
            },
            {"prompt": "plain completion"},
        ]
    )
)
RESULTS = "\n".join(
    json.dumps(row)
    for row in [
        {
            "response": {
                "status_code": 200,
                "body": {"usage": {"prompt_tokens": 11, "completion_tokens": 22}},
            },
            "error": None,
        },
        {"response": {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}},
        {"response": {"status_code": 500, "body": {}}, "error": None},
    ]
)
EXAMPLES = {
    "azure": AZURE,
    "mooncake": MOONCAKE,
    "burstgpt": BURSTGPT,
    "sharegpt": SHAREGPT,
    "custom": CUSTOM,
    "timed_trace": TIMED,
    "openai_batch": BATCH,
}


Write = Callable[[str | bytes], Path]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_from_its_content(write: Write, name: str) -> None:
    path = write(EXAMPLES[name])
    found = read_workload(path)
    assert found.format == name
    assert found.source == str(path)
    named = read_workload(path, name.replace("_", "-").upper())
    assert named.rows == found.rows


def test_azure_keeps_all_seven_digits(write: Write) -> None:
    rows = read_workload(write(AZURE)).rows
    assert [(row.input_tokens, row.output_tokens) for row in rows] == [
        (374, 44),
        (396, 109),
        (879, 55),
    ]
    assert [row.arrival_s for row in rows] == [0.0, 4.314579, 4.541877]
    precise = AZURE.replace("6805900", "6805901")
    assert read_workload(write(precise)).rows[1].arrival_s == 4.3145789


def test_azure_2024_has_offsets_and_other_fractions(write: Write) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 02:00:01+02:00,2399,6\n"
        "2024-05-09T23:00:02.5-0100,76,15\n"
    )
    arrivals = [row.arrival_s for row in read_workload(write(text)).rows]
    assert arrivals == pytest.approx([0.0, 0.99007, 2.49007], abs=1e-9)


def test_mooncake(write: Write) -> None:
    first, second = read_workload(write(MOONCAKE)).rows
    assert (first.arrival_s, second.arrival_s) == (0.0, 3.0)
    assert first.prefix_ids == (0, 42, 43, 44, 45)
    assert first.prefix_block_tokens == 512


def test_burstgpt_leaves_out_failed_requests(write: Write) -> None:
    found = read_workload(write(BURSTGPT))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens, r.session_id) for r in found.rows] == [
        (0.0, 472, 18, "7"),
        (4.5, 1087, 230, "8"),
    ]
    assert found.notes == ("1 rows with 0 response tokens were left out: failed requests",)


def test_burstgpt_of_before_sessions(write: Write) -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,m,4,2,6,x\n"
    assert read_workload(write(text)).rows[0].session_id is None


def test_sharegpt_takes_the_first_question_and_answer(write: Write) -> None:
    found = read_workload(write(SHAREGPT))
    (row,) = found.rows
    assert row.prompt == "What is a quokka, in a word?"
    assert row.completion == "A small marsupial."
    assert (row.input_tokens, row.output_tokens) == (7, 4)
    assert not found.timed
    assert "2 conversations without" in found.notes[0]
    assert "1 texts are estimates" in found.notes[1]


def test_custom(write: Write) -> None:
    found = read_workload(write(CUSTOM), default_output_tokens=77)
    one, two, three = found.rows
    assert (one.prompt, one.output_tokens) == ("Once upon a time", 12)
    assert two.output_tokens == 77
    assert (three.token_ids, three.input_tokens, three.output_tokens) == ((5, 6, 7), 3, 4)
    assert three.session_id == "3"
    assert "1 rows without output_tokens get 77" in found.notes


def test_timed_trace_units_and_blocks(write: Write) -> None:
    one, two = read_workload(write(TIMED)).rows
    assert two.arrival_s == 2.0
    assert one.prefix_block_tokens == 16
    assert one.prefix_ids is not None
    assert two.prefix_ids is not None
    assert one.prefix_ids[0] == two.prefix_ids[0]
    assert one.prefix_ids[1] != two.prefix_ids[1]
    assert read_workload(write(TIMED), time_unit="ms").rows[1].arrival_s == pytest.approx(0.002)
    assert read_workload(write(TIMED), block_tokens=10).rows[0].prefix_block_tokens == 10
    with pytest.raises(BadInput, match=r"line 1: hash_ids has 3 blocks of 64 tokens"):
        read_workload(write(TIMED), block_tokens=64)


def test_text_ids_are_the_same_in_every_process(write: Write) -> None:
    ids = read_workload(write(TIMED)).rows[0].prefix_ids
    assert ids is not None
    assert ids[0] == 5395104992458594383


def test_openai_batch(write: Write) -> None:
    found = read_workload(write(BATCH))
    chat, plain = found.rows
    assert chat.prompt == "system: short\nuser: hello there"
    assert chat.output_tokens == 9
    assert (plain.prompt, plain.output_tokens) == ("plain completion", 256)


def test_openai_batch_results(write: Write) -> None:
    found = read_workload(write(RESULTS))
    assert [(r.input_tokens, r.output_tokens) for r in found.rows] == [(11, 22), (1, 2)]
    assert found.notes == ("1 failed requests of the batch were left out",)


def test_rows_that_run_backwards_are_sorted_and_noted(write: Write) -> None:
    text = AZURE.replace("18:15:46", "18:15:52")
    found = read_workload(write(text))
    assert [row.input_tokens for row in found.rows] == [396, 879, 374]
    assert found.rows[0].arrival_s == 0.0
    assert found.rows[2].arrival_s == pytest.approx(1.685421)
    assert "timestamps ran backwards 1 times" in found.notes[0]


@pytest.mark.parametrize("name", FORMATS)
def test_windows_line_ends_and_byte_order_mark(write: Write, name: str) -> None:
    plain = read_workload(write(EXAMPLES[name]))
    windows = b"\xef\xbb\xbf" + EXAMPLES[name].replace("\n", "\r\n").encode() + b"\r\n\r\n"
    assert read_workload(write(windows)).rows == plain.rows


@pytest.mark.parametrize("name", FORMATS)
def test_max_rows(write: Write, name: str) -> None:
    assert len(read_workload(write(EXAMPLES[name]), max_rows=1).rows) == 1


def _azure(row: str) -> str:
    return AZURE + row + "\n"


def _json(**changes: object) -> str:
    row = {"timestamp": 1, "input_length": 20, "output_length": 3, "hash_ids": [1]} | changes
    return MOONCAKE + json.dumps(row) + "\n"


_DATE = "2023-11-16 18:15:52.0000000"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "is empty"),
        (" \n\n", "holds no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "holds no requests"),
        ("a,b,c\n1,2,3\n", "line 1: 'a,b,c' begins no known workload"),
        ("just text", "begins no known workload"),
        ('{"foo": 1}\n', "line 1: an object with 'foo' belongs to no known workload"),
        ("{}\n", "line 1: an object with no fields"),
        ("[]", "holds no requests"),
        ("[1]", "line 1: has '1' where the JSON array must have { or ]"),
        ("[or]", "line 1: has 'o'"),
        ('[{"conversations": []},]', "has ']' where the JSON array must have {"),
        ('[{"conversations": []}] x', "has 'x' where the JSON array must have nothing more"),
        ('[{"conversations": []}', "cut off"),
        ('[\n{"conversations":\n[}]', "line 3: is not valid JSON"),
        (SHAREGPT[:-100], "cut off"),
        ("[" * 100_000, "line 1"),
        ('[{"conversations": ' + "[" * 100_000, "line 1: is not valid JSON"),
        ('{"prompt": ' + "[" * 100_000, "line 1: is not valid JSON"),
        (_azure(f"{_DATE},12,abc"), "line 5: GeneratedTokens is 'abc'; it must be a whole number"),
        (_azure(f"{_DATE},-1,5"), "line 5: ContextTokens is '-1'"),
        (_azure(f"{_DATE},0,5"), "line 5: ContextTokens is '0'"),
        (_azure(f"{_DATE},12.5,5"), "line 5: ContextTokens is '12.5'"),
        (_azure(f"{_DATE},nan,5"), "line 5: ContextTokens is 'nan'"),
        (_azure(f"{_DATE},inf,5"), "line 5: ContextTokens is 'inf'"),
        (_azure(f"{_DATE},1e99,5"), "line 5: ContextTokens is '1e99'"),
        (_azure(f"{_DATE},{'9' * 5000},5"), "line 5: ContextTokens is '999"),
        (_azure(f"{_DATE},,5"), "line 5: ContextTokens is ''"),
        (_azure("yesterday,12,5"), "line 5: TIMESTAMP is 'yesterday'; it must be a date"),
        (_azure("2023-13-45 18:15:52,12,5"), "line 5: TIMESTAMP is '2023-13-45"),
        (_azure(f"{_DATE},12"), "line 5: has 2 fields; it must have 3"),
        (_azure(f"{_DATE},12,5,7"), "line 5: has 4 fields"),
        (_azure(f'"{_DATE},12,5'), "line 5: is not valid CSV"),
        (_azure("x" * 200_000), "is not valid CSV"),
        (AZURE.encode() + b"\xff\xfe\n", "line 5: is not UTF-8"),
        (AZURE.encode() + b"a\0b\n", "line 5: holds a NUL byte"),
        (AZURE.encode("utf-16"), "is encoded in UTF-16"),
        (b"\x1f\x8b\x08\x00junk", "compressed with gzip"),
        (_json(input_length=-3), "line 3: input_length is -3"),
        (_json(input_length="20"), "line 3: input_length is '20'"),
        (_json(input_length=True), "line 3: input_length is True"),
        (_json(input_length=None), "line 3: input_length is None"),
        (_json(input_length=20.5), "line 3: input_length is 20.5"),
        (_json(input_length=10**30), "line 3: input_length is 1000"),
        (_json(input_length=10**400), "line 3: input_length is huge"),
        (_json(timestamp=float("nan")), "line 3: timestamp is nan; it must be a number"),
        (_json(timestamp=float("inf")), "line 3: timestamp is inf"),
        (_json(timestamp=1e300), "line 3: timestamp is 1e+300"),
        (_json(timestamp="soon"), "line 3: timestamp is 'soon'"),
        (_json(hash_ids=[1, 2]), "line 3: hash_ids has 2 blocks of 512 tokens"),
        (_json(hash_ids=[1.5]), "line 3: hash_ids must hold whole numbers"),
        (_json(hash_ids={"a": 1}), "line 3: hash_ids is {'a': 1}; it must be an array"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3: input_length is missing"),
        (MOONCAKE + '{"timestamp": 9, "inp', "line 3: is not valid JSON (Unterminated string"),
        (MOONCAKE + "[1, 2]\n", "line 3: holds an array; it must hold one JSON object"),
        (MOONCAKE + "null\n", "line 3: holds null"),
        (MOONCAKE + '{"timestamp": ' + "9" * 5000 + "}\n", "line 3: is not valid JSON"),
        (BURSTGPT + "1,2,3,m,abc,5,5,x\n", "line 5: Request tokens is 'abc'"),
        (BURSTGPT + "x,2,3,m,4,5,5,x\n", "line 5: Timestamp is 'x'"),
        ('{"prompt": "x"}\n{"prompt": ""}\n', "line 2: prompt is ''; it must be a text"),
        ('{"prompt": "x"}\n{"prompt": 4}\n', "line 2: prompt is 4"),
        ('{"prompt": "x", "output_tokens": 0}\n', "line 1: output_tokens is 0"),
        ('{"prompt_token_ids": [-1]}\n', "line 1: prompt_token_ids must hold"),
        ('{"prompt_token_ids": []}\n', "line 1: prompt_token_ids must hold"),
        ('{"conversations": 3}\n', "line 1: conversations is 3; it must be an array"),
        ('{"conversations": [3]}\n', "line 1: conversations must hold objects"),
        ('{"conversations": [{"from": "gpt"}]}\n', "line 1: conversations must hold objects"),
        ('{"body": 3}\n', "line 1: body is 3; it must be an object"),
        ('{"body": {}}\n', "line 1: body has neither messages nor prompt"),
        ('{"body": {"messages": []}}\n', "line 1: messages is empty"),
        ('{"body": {"messages": ["hi"]}}\n', "line 1: messages must hold objects"),
        (
            '{"body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}}\n',
            "line 1: messages has content beside text",
        ),
    ],
)
def test_bad_rows_are_named(write: Write, content: str | bytes, told: str) -> None:
    path = write(content)
    with pytest.raises(BadInput) as caught:
        read_workload(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert told in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))


def test_files_that_cannot_be_read(tmp_path: Path, write: Write) -> None:
    with pytest.raises(BadInput, match="is a folder"):
        read_workload(tmp_path)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        read_workload(tmp_path / "missing.csv")
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(BadInput, match="cannot be read"):
            read_workload(tmp_path / name)
    with pytest.raises(BadInput, match="'parquet' is not a workload format; known are azure"):
        read_workload(write(AZURE), "parquet")


@pytest.mark.parametrize("wrong", FORMATS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_format_is_a_clear_error(write: Write, name: str, wrong: str) -> None:
    path = write(EXAMPLES[name])
    if wrong == name or (wrong, name) == ("timed_trace", "mooncake"):
        assert read_workload(path, wrong).rows
        return
    with pytest.raises(BadInput, match=r"line|holds no requests"):
        read_workload(path, wrong)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from(sorted(EXAMPLES)),
    position=st.floats(0, 1),
    junk=st.binary(max_size=8),
    length=st.integers(0, 40),
)
def test_a_damaged_file_is_read_or_refused(
    write: Write, name: str, position: float, junk: bytes, length: int
) -> None:
    content = EXAMPLES[name].encode()
    at = int(position * len(content))
    try:
        found = read_workload(write(content[:at] + junk + content[at + length :]))
    except BadInput as error:
        rows, message = (), str(error)
    else:
        rows, message = found.rows, ""
    assert bool(rows) != bool(message)
    for row in rows:
        assert row.input_tokens >= 1
        assert row.output_tokens >= 1
        assert 0 <= row.arrival_s < 1e13
    assert [r.arrival_s for r in rows] == sorted(r.arrival_s for r in rows)
