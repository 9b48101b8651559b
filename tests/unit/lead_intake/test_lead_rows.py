"""Rows out of bytes: whatever a file holds, each row is read or told, and none stops the others."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lead_intake.api.rows import LONGEST_RECORD, BadFile, CsvRows, NdjsonRows, Row, RowReader

COLUMNS = {"name": "name", "姓名": "name", "phone": "phone", "手机": "phone", "company": "company", "公司": "company"}


def read(reader: RowReader, data: bytes, piece: int = 1 << 16) -> list[Row]:
    def rows() -> Iterator[Row]:
        for start in range(0, len(data), piece):
            yield from reader.feed(data[start : start + piece])
        yield from reader.finish()

    return list(rows())


def cells(data: bytes, piece: int = 1 << 16) -> list[Mapping[str, str] | str]:
    """What each record holds, or the slug of its problem."""
    rows = read(CsvRows(COLUMNS, ("facts.",)), data, piece)
    assert [row.number for row in rows] == list(range(1, len(rows) + 1))
    found: list[Mapping[str, str] | str] = []
    for row in rows:
        if row.problem is not None:
            found.append(row.problem[0])
        else:
            assert isinstance(row.content, Mapping)
            found.append(row.content)
    return found


class TestCsv:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_encodings_delimiters_and_line_ends(self, encoding: str, delimiter: str, end: str) -> None:
        lines = [["姓名", "手机"], ["张伟", "13800138000"], ["李 娜𠮷", "13900139000"]]
        data = end.join(delimiter.join(line) for line in lines).encode(encoding)
        assert cells(data) == [
            {"name": "张伟", "phone": "13800138000"},
            {"name": "李 娜𠮷", "phone": "13900139000"},
        ]

    def test_an_encoding_that_shows_late_is_found(self) -> None:
        data = b"name,phone\n" + b"Ann,1\n" * 5000 + "张伟,2\n".encode("gb18030")
        assert cells(data)[-1] == {"name": "张伟", "phone": "2"}

    def test_bytes_of_no_encoding_refuse_their_row_only(self) -> None:
        data = "姓名,手机\n张伟,1\n".encode() + b"\xff\xfe\xff,2\n" + "李娜,3\n".encode()
        assert cells(data) == [{"name": "张伟", "phone": "1"}, "not-decodable", {"name": "李娜", "phone": "3"}]

    def test_quotes_hold_delimiters_quotes_and_lines(self) -> None:
        data = b'name,phone\n"Wei, ""Zhang""\nof Beijing",1\nLi,2\n'
        assert cells(data) == [{"name": 'Wei, "Zhang"\nof Beijing', "phone": "1"}, {"name": "Li", "phone": "2"}]

    def test_a_quote_inside_an_unquoted_cell_is_text(self) -> None:
        assert cells(b'name,phone\n5" pipe,1\nLi,2\n') == [
            {"name": '5" pipe', "phone": "1"},
            {"name": "Li", "phone": "2"},
        ]

    def test_a_quote_without_an_end_refuses_its_row_only(self) -> None:
        data = b'name,phone\nA,1\n"B,2\nC,3\nD,4\n'
        assert cells(data) == [
            {"name": "A", "phone": "1"},
            "broken-quotes",
            {"name": "C", "phone": "3"},
            {"name": "D", "phone": "4"},
        ]

    def test_a_quote_without_an_end_does_not_swallow_a_long_file(self) -> None:
        data = b'name,phone\n"B,2\n' + b"C,3\n" * 50_000
        found = cells(data)
        assert found[0] == "broken-quotes"
        assert found[1:] == [{"name": "C", "phone": "3"}] * 50_000

    def test_text_after_a_closing_quote_is_broken(self) -> None:
        assert cells(b'name,phone\n"B"x,2\nC,3\n') == ["broken-quotes", {"name": "C", "phone": "3"}]

    def test_ragged_rows_are_told(self) -> None:
        data = b"name,phone\nA\nB,1,2\nC,3,,\nD,4\n"
        assert cells(data) == ["ragged-row", "ragged-row", {"name": "C", "phone": "3"}, {"name": "D", "phone": "4"}]

    def test_a_row_that_is_too_long_is_told_and_skipped(self) -> None:
        data = b"name,phone\n" + b"x" * (LONGEST_RECORD * 3) + b",1\nC,3\n"
        for piece in (1 << 16, 7919):
            assert cells(data, piece) == ["row-too-long", {"name": "C", "phone": "3"}]

    def test_line_numbers_are_those_of_the_file(self) -> None:
        rows = read(CsvRows(COLUMNS), b'name,phone\n\n"A\nB",1\nC,3\n')
        assert [(row.number, row.line) for row in rows] == [(1, 3), (2, 5)]

    def test_nul_bytes_stay_in_their_cell(self) -> None:
        assert cells(b"name,phone\nA\x00B,1\n") == [{"name": "A\x00B", "phone": "1"}]

    def test_titles_in_any_case_and_facts(self) -> None:
        assert cells(b" Name ,PHONE,facts.budget\nA,1,500\n") == [{"name": "A", "phone": "1", "facts.budget": "500"}]

    @pytest.mark.parametrize(
        ("data", "slug"),
        [
            (b"", "no-header"),
            (b"\n\n", "no-header"),
            (b"name,shoe size\nA,42\n", "unknown-column"),
            ("name,姓名\nA,B\n".encode(), "column-twice"),
            ("name\n".encode("utf-16"), "utf-16"),
            (b",".join(b"name" for _ in range(101)) + b"\n", "too-many-columns"),
            (b'"name,phone\nA,1\n', "broken-quotes"),
            (b"x" * (LONGEST_RECORD + 1) + b"\n", "row-too-long"),
        ],
    )
    def test_a_file_without_a_good_header_is_refused(self, data: bytes, slug: str) -> None:
        with pytest.raises(BadFile) as refused:
            read(CsvRows(COLUMNS), data)
        assert refused.value.slug == slug

    def test_unknown_columns_are_skipped_when_asked(self) -> None:
        (row,) = read(CsvRows(COLUMNS, ignore_unknown=True), b"name,shoe size\nA,42\n")
        assert row.content == {"name": "A"}

    @given(
        st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=8),
        st.integers(1, 40),
        st.sampled_from(["utf-8-sig", "gb18030"]),
    )
    def test_what_a_writer_wrote_is_read_in_pieces_of_any_size(
        self, people: list[tuple[str, str]], piece: int, encoding: str
    ) -> None:
        people = [(name.replace("\r", " "), phone.replace("\r", " ")) for name, phone in people]
        text = io.StringIO()
        writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("姓名", "手机"), *people])
        found = cells(text.getvalue().encode(encoding), piece)
        assert found == [{k: v for k, v in zip(("name", "phone"), person, strict=True) if v} for person in people]

    @given(st.binary(max_size=300), st.integers(1, 60))
    def test_pieces_make_no_difference_and_nothing_is_lost(self, data: bytes, piece: int) -> None:
        data = b"name,phone\n" + data.replace(b"\xff", b'"').replace(b"\xfe", b"\n").replace(b"\xfd", b",")
        assert cells(data, piece) == cells(data)
        assert b"".join(row.raw for row in read(CsvRows(COLUMNS), data)).count(b"A") == data.count(b"A")


class TestNdjson:
    def test_lines_blank_lines_and_a_last_one_without_end(self) -> None:
        rows = read(NdjsonRows(), b'\xef\xbb\xbf{"a":1}\r\n\n{"b":2}')
        assert [(row.number, row.line, row.content) for row in rows] == [(1, 1, b'{"a":1}'), (2, 3, b'{"b":2}')]

    def test_a_line_that_is_too_long_is_told_and_skipped(self) -> None:
        data = b'{"a":1}\n' + b"x" * (LONGEST_RECORD * 2) + b'\n{"b":2}\n' + b"y" * (LONGEST_RECORD + 2)
        for piece in (1 << 16, 1000):
            rows = read(NdjsonRows(), data, piece)
            assert [row.problem and row.problem[0] for row in rows] == [None, "row-too-long", None, "row-too-long"]

    @given(
        st.lists(st.binary(min_size=1, max_size=20).filter(lambda b: b.strip() and b"\n" not in b)), st.integers(1, 30)
    )
    def test_pieces_make_no_difference(self, lines: list[bytes], piece: int) -> None:
        data = b"\n".join([b"{}", *lines])
        assert read(NdjsonRows(), data, piece) == read(NdjsonRows(), data)
