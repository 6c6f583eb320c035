"""Makes a `bytes` object that is written in place before anybody else has it.

Flower's records carry `bytes`, which Python can only make of other bytes: a buffer that is put together elsewhere is
copied once more. CPython's interface lets whoever makes the object write to it first ("Bytes Objects" in its C API:
`PyBytes_FromStringAndSize` without a string, then `PyBytes_AsString`), which is what its own library does.
"""

import ctypes

_WRITABLE = 0x200  # PyBUF_WRITE
_allocate = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))
_view = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)(
    ("PyMemoryView_FromMemory", ctypes.pythonapi)
)


def new_bytes(size: int) -> tuple[bytes, memoryview]:
    """Bytes of that size, of any content, and a view to write all of them through.

    The view does not keep the bytes alive: write while you hold both, then let the view go and pass the bytes on.

    Raises:
        MemoryError: when there is no room.
    """
    buffer = _allocate(None, size)
    return buffer, _view(_address(buffer), size, _WRITABLE)
