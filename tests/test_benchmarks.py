from benchmarks import run


def side(**parts):
    return {"run": 1.0, "step": 1.0, "review": 1.0, "tokenizing": 1.0, "peak_memory": 100} | parts


def test_a_line_of_the_table_holds_the_median_of_the_rounds_ratios():
    rounds = [{"reference": side(run=6.0, step=a), "project": side(run=2.0, step=2.0)} for a in (2.0, 9.0, 4.0)]
    assert run.table_line("gpt2-all", rounds) == "| gpt2-all | 3.00x | 2.00x | 1.00x | 1.00x | 1.00x |"


def test_parts_that_one_side_does_not_have_stay_empty():
    rounds = [{"reference": {"run": 10.0, "peak_memory": 5}, "project": {"run": 4.0, "peak_memory": 10}}]
    assert run.table_line("data", rounds) == "| data | 2.50x |  |  |  | 0.50x |"
    rounds = [{"reference": side(run=8.0), "project": side(once=0.5, step=0.001)}]
    assert run.table_line("gpt2-last_layer", rounds) == "| gpt2-last_layer | 8.00x |  |  | 1.00x | 1.00x |"
