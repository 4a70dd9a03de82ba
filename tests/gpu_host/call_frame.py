"""Calls an XLA FFI handler without XLA: builds the call frame of ``xla/ffi/api/c_api.h`` with ctypes."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass

import numpy as np

_DTYPES = {"int32": 4, "int64": 5, "uint16": 7, "float32": 11}
_FUNCTIONS = (
    "Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register", "Stream_Get", "Type_Register",
    "ExecutionContext_Get", "State_Set", "State_Get", "DeviceMemory_Allocate", "DeviceMemory_Free",
    "ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create", "Future_SetAvailable", "Future_SetError",
    "RunId_Get", "DeviceOrdinal_Get",
)  # fmt: skip


def _struct(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """A structure that starts, as all of them do, with its size and a pointer to extensions."""
    start = [("struct_size", c_size_t), ("extension_start", c_void_p)]
    return type(name, (ctypes.Structure,), {"_fields_": start + list(fields)})


_Buffer = _struct("Buffer", ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64)))
_List = _struct("List", ("size", c_int64), ("types", POINTER(c_int)), ("values", POINTER(c_void_p)))
_Attributes = _struct(
    "Attributes",
    ("size", c_int64),
    ("types", POINTER(c_int)),
    ("names", POINTER(c_void_p)),
    ("values", POINTER(c_void_p)),
)
_Version = _struct("Version", ("major", c_int), ("minor", c_int))
_Api = _struct("Api", ("version", _Version), ("internal", c_void_p), *((name, c_void_p) for name in _FUNCTIONS))
_Frame = _struct(
    "Frame", ("api", POINTER(_Api)), ("context", c_void_p), ("stage", c_int), ("args", _List), ("rets", _List),
    ("attributes", _Attributes), ("future", c_void_p),
)  # fmt: skip
_ErrorArgs = _struct("ErrorArgs", ("message", c_char_p), ("code", c_int))
_ContextArgs = _struct("ContextArgs", ("context", c_void_p), ("value", c_int64))
_OrdinalArgs = _struct("OrdinalArgs", ("context", c_void_p), ("value", c_int32))


class _Span(ctypes.Structure):
    _fields_ = [("text", c_char_p), ("length", c_size_t)]


class _Scalar(ctypes.Structure):
    _fields_ = [("dtype", c_int), ("value", c_void_p)]


class _Array(ctypes.Structure):
    _fields_ = [("dtype", c_int), ("size", c_size_t), ("data", c_void_p)]


@dataclass(frozen=True)
class Buffer:
    """An operand or a result: where it is, and what."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Place:
    """What XLA tells a handler about where it runs."""

    stream: int
    ordinal: int
    run_id: int


class HandlerError(Exception):
    """What a handler returned, as ``code: message``; codes are those of Abseil."""


_places: dict[int, Place] = {}
_errors: dict[int, str] = {}
_numbers = itertools.count(1)

_Callback = ctypes.CFUNCTYPE(c_void_p, c_void_p)


@_Callback
def _create_error(address: int) -> int:
    arguments = _ErrorArgs.from_address(address)
    number = next(_numbers)
    _errors[number] = f"{arguments.code}: {arguments.message.decode()}"
    return number


@_Callback
def _stream(address: int) -> None:
    arguments = _ContextArgs.from_address(address)
    arguments.value = _places[arguments.context].stream


@_Callback
def _run_id(address: int) -> None:
    arguments = _ContextArgs.from_address(address)
    arguments.value = _places[arguments.context].run_id


@_Callback
def _ordinal(address: int) -> None:
    arguments = _OrdinalArgs.from_address(address)
    arguments.value = _places[arguments.context].ordinal


def _make_api() -> ctypes.Structure:
    api = _Api(struct_size=ctypes.sizeof(_Api), version=_Version(ctypes.sizeof(_Version), None, 0, 3))
    callbacks = {
        "Error_Create": _create_error,
        "Stream_Get": _stream,
        "RunId_Get": _run_id,
        "DeviceOrdinal_Get": _ordinal,
    }
    for name, callback in callbacks.items():
        setattr(api, name, ctypes.cast(callback, c_void_p))
    return api


_api = _make_api()


def call(
    handler: ctypes._CFuncPtr,
    arguments: Sequence[Buffer],
    results: Sequence[Buffer],
    attributes: Mapping[str, np.ndarray | np.generic],
    place: Place,
) -> None:
    """Calls a handler and waits for it.

    Raises:
        HandlerError: The handler failed.
    """
    keep: list[object] = []  # what the frame points to

    def array(kind: type, values: Sequence[object]) -> ctypes.Array:
        made = (kind * len(values))(*values)
        keep.append(made)
        return made

    def pointer(value: object) -> int:
        keep.append(value)
        return ctypes.addressof(value)  # type: ignore[arg-type]

    def buffers(some: Sequence[Buffer]) -> ctypes.Structure:
        made = [
            pointer(
                _Buffer(
                    ctypes.sizeof(_Buffer),
                    None,
                    _DTYPES[buffer.dtype.name],
                    buffer.address,
                    len(buffer.shape),
                    array(c_int64, buffer.shape),
                )
            )
            for buffer in some
        ]
        return _List(ctypes.sizeof(_List), None, len(some), array(c_int, [1] * len(some)), array(c_void_p, made))

    names, types, values = [], [], []
    for name in sorted(attributes):
        value = np.ascontiguousarray(attributes[name])
        keep.append(value)
        scalar = np.ndim(attributes[name]) == 0
        dtype = _DTYPES[value.dtype.name]
        names.append(pointer(_Span(name.encode(), len(name))))
        types.append(3 if scalar else 1)
        made = _Scalar(dtype, value.ctypes.data) if scalar else _Array(dtype, value.size, value.ctypes.data)
        values.append(pointer(made))
    context = next(_numbers)
    _places[context] = place
    frame = _Frame(
        ctypes.sizeof(_Frame) - ctypes.sizeof(c_void_p),  # the future does not count
        None,
        ctypes.pointer(_api),
        context,
        3,  # execute
        buffers(arguments),
        buffers(results),
        _Attributes(
            ctypes.sizeof(_Attributes),
            None,
            len(names),
            array(c_int, types),
            array(c_void_p, names),
            array(c_void_p, values),
        ),
        None,
    )
    handler.restype, handler.argtypes = c_void_p, [c_void_p]
    try:
        error = handler(ctypes.addressof(frame))
    finally:
        del _places[context]
    if error:
        raise HandlerError(_errors.pop(error))
