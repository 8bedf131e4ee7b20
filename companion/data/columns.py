"""Columns in Arrow that give back what was put in, whatever else stands in the file.

Arrow gives every mapping of a column the keys of all of them, null where they were absent, and
makes 2 beside 2.5 a 2.0. A chat template writes what it is given, so a row's tools and tool calls
would depend on its neighbours (datasets #7617). Mappings are therefore kept as JSON
(:class:`datasets.Json`); texts, numbers, and the roles and contents of messages are plain columns.
Chapter 4.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetInfo, Features, Json, LargeList, List
from datasets.fingerprint import generate_random_fingerprint

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets.table import Table

#: in a set of fields: the column itself
WHOLE = ""


class ExactJson(Json):
    """:class:`datasets.Json` that reads and writes by the standard library.

    That of `datasets` 5.2 reads by pandas' ujson, which changes the last digit of many numbers
    (0.002054944418186575), refuses integers of more than 64 bits, and takes a text that is valid
    JSON (``"2"``) for the value. Saved, the feature is ``Json`` itself, so other tools read it.
    """

    def encode_example(self, example_data: Any) -> str | None:
        """JSON text; None stays None."""
        return None if example_data is None else json.dumps(example_data)

    def decode_example(self, example_data: Any, token_per_repo_id: Any = None) -> Any:
        """The value; None stays None."""
        return None if example_data is None else json.loads(example_data)


def array_of(values: list[Any], as_json: Iterable[str] = ()) -> pa.Array:
    """An Arrow array of one column.

    Parameters
    ----------
    values : list
        Texts, numbers, lists of them, messages or lists of messages, or other JSON.
    as_json : iterable of str
        Fields of messages to keep as JSON even if all are text here, since they are JSON in another
        part of the file; :data:`WHOLE` for the column.

    Raises
    ------
    pyarrow.ArrowException, OverflowError
        For values of mixed types.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    fields = set(as_json)
    if WHOLE not in fields:
        messages = list(mappings(values))
        if not messages and not fields:
            return pa.array(values)
        if all("role" in m and isinstance(m.get("content", ""), str) for m in messages) and not any(
            isinstance(value, Mapping) for value in values
        ):
            fields |= {
                key
                for message in messages
                for key, value in message.items()
                if value is not None and not isinstance(value, str)
            }
        else:
            fields = {WHOLE}
    try:
        return _array(values, fields)
    except TypeError:  # bytes, dates: no JSON
        return pa.array(values)


def mappings(values: Iterable[Any]) -> Iterable[Mapping[str, Any]]:
    """All mappings that stand in lists, however deep, or alone."""
    for value in values:
        if isinstance(value, Mapping):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from mappings(value)


def _array(values: list[Any], fields: set[str]) -> pa.Array:
    import pyarrow as pa  # type: ignore[import-untyped]

    if WHOLE in fields:
        return pa.array([None if v is None else json.dumps(v) for v in values]).cast(pa.json_())

    if not fields:
        return pa.array(values)

    def written(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                k: json.dumps(v) if k in fields and v is not None else v for k, v in value.items()
            }
        return [written(item) for item in value] if isinstance(value, (list, tuple)) else value

    array = pa.array([written(value) for value in values])
    return array.cast(_with_json(array.type, fields))


def _with_json(kind: pa.DataType, fields: set[str]) -> pa.DataType:
    """The type with JSON in place of text in these fields of its mappings."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if pa.types.is_struct(kind):
        return pa.struct(
            [(field.name, pa.json_() if field.name in fields else field.type) for field in kind]
        )
    return pa.list_(_with_json(kind.value_type, fields)) if pa.types.is_list(kind) else kind


def json_fields(kind: pa.DataType) -> set[str]:
    """The fields that a type keeps as JSON, as :func:`array_of` takes them."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if isinstance(kind, pa.JsonType):
        return {WHOLE}
    if pa.types.is_list(kind):
        return json_fields(kind.value_type)
    if pa.types.is_struct(kind):
        return {field.name for field in kind if isinstance(field.type, pa.JsonType)}
    return set()


def reader_of(kind: pa.DataType, *, decode: bool = True) -> Callable[[Any], Any]:
    """From what Arrow gives of a column to the value that was put in.

    A null key of a struct is left out, since Arrow cannot tell it from an absent one; in JSON it
    stays.

    Parameters
    ----------
    decode : bool
        False where JSON is already read, as `datasets` does.
    """
    import pyarrow as pa  # type: ignore[import-untyped]

    if isinstance(kind, pa.JsonType):
        return (lambda v: None if v is None else json.loads(v)) if decode else (lambda v: v)
    if pa.types.is_struct(kind):
        inner = {field.name: reader_of(field.type, decode=decode) for field in kind}
        return lambda value: (
            {k: inner[k](v) for k, v in value.items() if v is not None and k in inner}
            if isinstance(value, Mapping)
            else value
        )
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        if not pa.types.is_nested(kind.value_type) and not json_fields(kind.value_type):
            return lambda value: value
        item = reader_of(kind.value_type, decode=decode)
        return lambda value: [item(v) for v in value] if isinstance(value, list) else value
    return lambda value: value


def exact(dataset: Dataset) -> Dataset:
    """The same rows; what is JSON in them is read exactly."""
    if "Json(" not in repr(dataset.features):
        return dataset
    found = copy.copy(dataset)
    found._info = dataset.info.copy()
    found._info.features = Features(_exact(dict(dataset.features)))
    return found


def exact_dataset(table: Table) -> Dataset:
    """The table as a dataset whose JSON is read exactly."""
    features = Features(_exact(dict(Features.from_arrow_schema(table.schema))))
    # `datasets` would make the fingerprint of a second copy of all that is in memory
    fingerprint = generate_random_fingerprint()
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=fingerprint)


def _exact(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {key: _exact(value) for key, value in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_exact(feature.feature))
    return ExactJson() if isinstance(feature, Json) else feature
