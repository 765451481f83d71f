"""How a thread helps another with a kernel, in machine code: no interpreter stands between.

A helper owns a mailbox, and looks into it for a while after each job, without the interpreter's
lock; a caller who has a job writes it there and begins with it. So a job that follows soon is
shared within a microsecond; a helper that is out of patience sleeps, and has to be woken.

The mailbox is a line of integers, and its state makes the rules:

    FREE → OFFERED → TAKEN → FREE       offer, take, done
    OFFERED → FREE                      withdrawn, by a caller who has finished alone
    FREE → ASLEEP → OFFERED             an offer to a sleeper, who is woken then
"""

from __future__ import annotations

from numba import types

from refattn.cpu.atomics import call, exchange, read, replace, step_aside, write
from refattn.cpu.compiling import kernel
from refattn.cpu.simd import pointer

MAIL = 16
"""Integers of a mailbox: two cache lines."""

STATE, NEXT = 0, 1
"""Places in a mailbox: its state, and the address of the next one of the same job, or 0."""

FUNCTION, DOUBLE, SCRATCH, JOB = 8, 9, 10, 11
"""Places of the job: address of the kernel (0 = go home), whether it computes in float64, and the
addresses that the kernel is called with."""

FREE, OFFERED, TAKEN, ASLEEP = 0, 1, 2, 3
"""States of a mailbox."""


@kernel
def offer_job(mail, wake, function, double, scratch, job):
    """Write a job into a mailbox; return whether its owner has to be woken, if that is wanted."""
    box = pointer(mail, types.int64(0))
    if not wake and read(box) == ASLEEP:
        return False
    box[FUNCTION], box[DOUBLE], box[SCRATCH], box[JOB] = function, double, scratch, job
    return exchange(box, types.int64(OFFERED)) == ASLEEP


@kernel
def serve(mail, turns):
    """Take job after job; return 1 where told to go home, and 0 after so many turns without one.

    The helper then counts as asleep, though it still has to wait for the interpreter's lock.
    """
    box = pointer(mail, types.int64(0))
    waited = 0
    while waited < turns or not replace(box, types.int64(FREE), types.int64(ASLEEP)):
        if read(box) == OFFERED and replace(box, types.int64(OFFERED), types.int64(TAKEN)):
            if box[FUNCTION] == 0:
                return 1
            if box[DOUBLE]:
                call(box[FUNCTION], types.float64(0), box[SCRATCH], box[JOB])
            else:
                call(box[FUNCTION], types.float32(0), box[SCRATCH], box[JOB])
            write(box, types.int64(FREE))
            waited = 0
        step_aside()
        waited += 1
    return 0


@kernel
def close_job(mail):
    """Withdraw a job from a chain of mailboxes, and wait for the helpers that have taken it.

    One call closes them all: no signal to the interpreter can come between, and leave a helper at
    work on memory that is freed.
    """
    while mail != 0:
        box = pointer(mail, types.int64(0))
        replace(box, types.int64(OFFERED), types.int64(FREE))
        while read(box) == TAKEN:
            step_aside()
        mail = box[NEXT]
