"""Columns of text for a terminal."""

from minicpm_edge.cli.table import format_table


def test_columns_line_up_and_lines_have_no_spaces_at_their_end():
    rows = [("RUN", "LOSS"), ("a long name", "3.1"), ("b", "")]
    assert format_table(rows) == "RUN          LOSS\na long name  3.1\nb"
    assert format_table(rows, num_left=1) == "RUN          LOSS\na long name   3.1\nb"
