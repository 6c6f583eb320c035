"""A space form by form: within one, what a subnet costs is a sum over its blocks, whose options tables list.

The columns that set the sizes of many blocks or say which there are, as resolution and depths do, make a subnet's
form. The others fall into groups that set one place each, as a block's kernel and expand ratio do; what they may be
together is a group's options. For every form that is asked for, the tables hold what each option of each group adds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from fedofa.device.operators import OperatorIndex, SubnetBatch


class Options:
    """The groups of a space and their options: a subnet is a form and an option for every group.

    Args:
        index: of the space.

    Attributes:
        form: the columns that make a subnet's form.
        num_options: of every group, `(num_groups,)`.
        features: the one-hot features that each option sets, with the number of features where it sets fewer than
            others, `(num_groups, most_options, most_columns)`.
    """

    def __init__(self, index: OperatorIndex) -> None:
        self.index, self.encoding, self.form = index, index.encoding, np.array(index.form_columns, np.int64)
        groups = [group for group in index.column_groups if not set(group) & set(index.form_columns)]
        values = [list(itertools.product(*(range(self.encoding.choices[c]) for c in group))) for group in groups]
        self.num_options = np.array([len(options) for options in values], np.int64)
        most = int(self.num_options.max(initial=1))
        self.features = np.full((len(groups), most, max(map(len, groups), default=1)), self.encoding.num_features)
        self._first = np.array([group[0] for group in groups], np.int64)  # a group's columns are all there, or none
        self._columns = np.array([column for group in groups for column in group], np.int64)
        self._group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self._values = np.zeros((len(self._columns), most), np.int16)
        self._radix = np.zeros((self.encoding.num_columns, len(groups)), np.int64)
        for number, (group, options) in enumerate(zip(groups, values, strict=True)):
            table = np.array(options, np.int16).T
            self._values[self._group == number, : len(options)] = table
            for position, column in enumerate(group):
                self.features[number, : len(options), position] = self.encoding.feature_starts[column] + table[position]
                self._radix[column, number] = np.prod(
                    self.encoding.choices[list(group[position + 1 :])], dtype=np.int64
                )

    @property
    def num_groups(self) -> int:
        """Groups of columns that are no part of the form."""
        return len(self._first)

    def chosen(self, rows: np.ndarray) -> np.ndarray:
        """The option of every group, the first one where a subnet lacks the group, `(num_subnets, num_groups)`."""
        return np.maximum(rows, 0) @ self._radix

    def rows(self, forms: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Subnets, `(num_subnets, num_columns)`.

        Args:
            forms: `(num_subnets, num_form_columns)`.
            chosen: the option of every group, `(num_subnets, num_groups)`.
        """
        rows = np.zeros((len(forms), self.encoding.num_columns), np.int16)
        rows[:, self.form] = forms
        rows[:, self._columns] = self._values[np.arange(len(self._columns)), chosen[:, self._group]]
        return self.encoding.normalised(rows)

    def present(self, rows: np.ndarray) -> np.ndarray:
        """Which groups subnets have, `(num_subnets, num_groups)`."""
        return rows[:, self._first] >= 0

    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        """The subnets' own forms, then those that differ in one column, `(num_subnets, num_forms, num_form_columns)`.

        A column that a form lacks, for another's sake, has its first value.
        """
        own, forms = np.maximum(rows[:, self.form], 0), list[np.ndarray]()
        for position, choices in enumerate(self.encoding.choices[self.form]):
            for step in range(1, int(choices)):
                forms.append(own.copy())
                forms[-1][:, position] = (own[:, position] + step) % choices
        return np.stack([own, *forms], axis=1)


class FormTables:
    """What the options of every group add to a subnet of a form, and what its first options take together.

    Args:
        options: of the space.
        features: of subnets, `(num_subnets, num_features)`.

    Attributes:
        present: which groups a form has, `(num_forms, num_groups)`.
        features: of the subnet with the first option everywhere, `(num_forms, num_features)`.
        operators: of that subnet, `(num_forms, num_places)`.
        added: to the features by every option, float32 `(num_forms, num_features, most_options * num_groups)`.
        replaced: the operator that every option puts in its group's place, the number of operators where it puts none,
            `(num_forms, most_options * num_groups)`.
    """

    def __init__(self, options: Options, features: Callable[[SubnetBatch], np.ndarray]) -> None:
        self._options, self._features = options, features
        smallest = np.zeros((1, len(options.form)), np.int16)
        self._numbers = {smallest.tobytes(): 0}
        self.present, self.features, self.operators, self.added, self.replaced = self._made(smallest)

    def numbers(self, forms: np.ndarray) -> np.ndarray:
        """The numbers of forms in the tables, which are extended by those not met before.

        Args:
            forms: `(num_subnets, num_forms, num_form_columns)`.

        Returns:
            `(num_subnets, num_forms)`.
        """
        flat = np.ascontiguousarray(forms.reshape(-1, forms.shape[2]) if forms.size else forms[:, 0], np.int16)
        choices = self._options.encoding.choices[self._options.form].astype(np.int64)
        codes = flat @ np.cumprod(np.append(1, choices))[:-1]
        _, first, member = np.unique(codes, return_index=True, return_inverse=True)
        new = [form for form in flat[first] if form.tobytes() not in self._numbers]
        if new:
            self._numbers |= {form.tobytes(): len(self._numbers) + place for place, form in enumerate(new)}
            names = ("present", "features", "operators", "added", "replaced")
            for name, made in zip(names, self._made(np.stack(new)), strict=True):
                setattr(self, name, np.concatenate([getattr(self, name), made]))
        numbers = np.array([self._numbers[form.tobytes()] for form in flat[first]], np.int64)
        return numbers[member.ravel()].reshape(forms.shape[:2])

    def _made(self, forms: np.ndarray) -> tuple[np.ndarray, ...]:
        """The tables of some forms, in the order of the attributes."""
        options = self._options
        groups, most = options.features.shape[:2]
        option, group = np.nonzero(np.arange(1, most)[:, None] < options.num_options)
        chosen = np.zeros((1 + len(group), groups), np.int64)  # the first options, then one other each
        chosen[1 + np.arange(len(group)), group] = option + 1
        rows = options.rows(np.repeat(forms, len(chosen), axis=0), np.tile(chosen, (len(forms), 1)))
        batch = SubnetBatch(options.index, rows)
        features = self._features(batch).reshape(len(forms), len(chosen), -1)
        operators = batch.operators.reshape(len(forms), len(chosen), -1)
        added = np.zeros((len(forms), features.shape[2], most, groups), np.float32)
        added[:, :, option + 1, group] = (features[:, 1:] - features[:, :1]).transpose(0, 2, 1)
        place = self._places(operators, group)
        replaced = np.repeat(operators[:, 0][:, None, place], most, axis=1)
        replaced[:, option + 1, group] = operators[:, 1 + np.arange(len(group)), place[group]]
        present = options.present(rows[:: len(chosen)])
        replaced[replaced < 0] = len(options.index.operators)
        added = added.reshape(*added.shape[:2], most * groups)
        replaced = replaced.reshape(len(forms), most * groups)
        return present, features[:, 0], operators[:, 0], added, replaced

    def _places(self, operators: np.ndarray, group: np.ndarray) -> np.ndarray:
        """The place that each group sets, `(num_groups,)`; of one that sets none in these forms, any.

        Args:
            operators: of every form's first options, then with one change each,
                `(num_forms, 1 + num_changes, num_places)`.
            group: of every change.
        """
        differs = (operators[:, 1:] != operators[:, :1]).any(axis=0)
        return np.array(
            [differs[group == number].any(axis=0).argmax() for number in range(self._options.num_groups)], np.int64
        )
