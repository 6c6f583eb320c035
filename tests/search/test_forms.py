"""Forms and options of every family: subnets are put together from them, and costs that add up are sums of tables."""

import numpy as np
import pytest
from cohorts import SPECS

from fedofa.device.models import Macs, Parameters
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.forms import FormTables, Options
from fedofa.supernet.families import build_elastic


@pytest.fixture(params=sorted(SPECS), scope="module")
def index(request):
    return OperatorIndex.of(build_elastic(SPECS[request.param]))


def drawn(index, number=20):
    return index.encoding.sample(np.random.default_rng(4), number)


def test_a_subnet_is_its_form_and_its_options(index):
    options, rows = Options(index), drawn(index)
    forms = options.neighbours(rows)
    assert (options.rows(forms[:, 0], options.chosen(rows)) == rows).all()
    assert (options.chosen(rows) < options.num_options).all()


def test_neighbours_are_the_own_form_and_all_that_differ_in_one_column(index):
    options, rows = Options(index), drawn(index)
    forms = options.neighbours(rows)
    assert forms.shape[1] == 1 + (index.encoding.choices[options.form] - 1).sum()
    assert ((forms != forms[:, :1]).sum(axis=2) == np.minimum(np.arange(forms.shape[1]), 1)).all()
    assert all(len(np.unique(own, axis=0)) == len(own) for own in forms)


def test_what_adds_up_is_the_sum_of_tables_in_any_form(index):
    models = (Macs(index), Parameters(index))

    def features(batch):
        return np.stack([model.predict(batch) for model in models], axis=1)

    options, rows = Options(index), drawn(index)
    tables = FormTables(options, features)
    forms = options.neighbours(rows)
    numbers = tables.numbers(forms)
    times = np.append(np.random.default_rng(1).uniform(1, 2, len(index.operators)), 0.0)
    for form in (0, forms.shape[1] - 1):
        chosen = options.chosen(rows)
        batch = SubnetBatch(index, options.rows(forms[:, form], chosen))
        own, groups = numbers[:, form], options.num_groups
        added = tables.added[own].reshape(len(rows), 2, -1, groups)
        replaced = tables.replaced[own].reshape(len(rows), -1, groups)
        every, group = np.arange(len(rows))[:, None], np.arange(groups)
        total = tables.features[own] + added[every, :, chosen, group].sum(axis=1)
        assert total == pytest.approx(features(batch), rel=1e-5)
        changed = times[replaced[every, chosen, group]] - times[replaced[:, 0]]
        assert times[tables.operators[own]].sum(axis=1) + changed.sum(axis=1) == pytest.approx(
            times[batch.operators].sum(axis=1), rel=1e-9
        )


def test_tables_grow_by_forms_not_met_before_and_keep_their_numbers(index):
    options, rows = Options(index), drawn(index)
    tables = FormTables(options, lambda batch: Macs(index).predict(batch)[:, None])
    forms = options.neighbours(rows)
    few, many = tables.numbers(forms[:2]), tables.numbers(forms)
    assert (many[:2] == few).all()
    assert len(tables.features) == len(np.unique(many[many > 0])) + 1  # the smallest form has a number from the start
    again = FormTables(options, lambda batch: Macs(index).predict(batch)[:, None])
    once = again.numbers(forms)
    assert (again.features[once] == tables.features[many]).all()
