//! Values that belong to one process. A forked process inherits the memory of its parent, but both processes must not
//! use the same connections, and the new process has neither the other threads nor the holders of locks.

use std::cell::Cell;
use std::process;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Every fork takes longer: it copies the page tables before it returns in the new process.
const SHORTEST_FORK: Duration = Duration::from_micros(10);

/// The id of this process. `now` is the current time.
///
/// The system call costs more than a whole checkout and checkin of a connection. Only the thread that calls `fork`
/// exists in the new process, and a fork takes longer than [`SHORTEST_FORK`], so an id that this thread has read more
/// recently is still correct.
#[inline]
pub(crate) fn id_at(now: Instant) -> u32 {
    thread_local! {
        static CACHED: Cell<Option<(Instant, u32)>> = const { Cell::new(None) };
    }
    match CACHED.get() {
        Some((read_at, id)) if now.saturating_duration_since(read_at) < SHORTEST_FORK => id,
        _ => {
            let id = process::id();
            CACHED.set(Some((now, id)));
            id
        }
    }
}

/// One value for each process. After a fork the new process creates its own value. It never drops the value of its
/// parent.
#[derive(Debug)]
pub(crate) struct PerProcess<T>(OnceLock<Box<ProcessValue<T>>>);

/// The value of one process, and the values of the processes that were forked later.
#[derive(Debug)]
struct ProcessValue<T> {
    process: u32,
    value: T,
    next: PerProcess<T>,
}

impl<T> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The value of this process, if the process has created one.
    pub(crate) fn get(&self) -> Option<&T> {
        self.value_of(process::id())
    }

    /// Like [`get`](Self::get), for a caller that has just read the clock.
    #[inline]
    pub(crate) fn get_at(&self, now: Instant) -> Option<&T> {
        self.value_of(id_at(now))
    }

    #[inline]
    fn value_of(&self, process: u32) -> Option<&T> {
        let mut entry = self.0.get()?;
        while entry.process != process {
            entry = entry.next.0.get()?;
        }
        Some(&entry.value)
    }

    /// The value of this process. `create` makes the value if the process has none.
    pub(crate) fn get_or_init(&self, create: impl Fn() -> T) -> &T {
        let current = process::id();
        let mut list = self;
        loop {
            let new = || Box::new(ProcessValue { process: current, value: create(), next: PerProcess::new() });
            let entry = list.0.get_or_init(new);
            if entry.process == current {
                return &entry.value;
            }
            list = &entry.next;
        }
    }

    /// The values of the processes from which this process was forked. Threads that do not exist in this process may
    /// hold their locks.
    pub(crate) fn inherited(&self) -> impl Iterator<Item = &T> {
        let current = process::id();
        let entries = std::iter::successors(self.0.get(), |entry| entry.next.0.get());
        entries.filter(move |entry| entry.process != current).map(|entry| &entry.value)
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let Some(entry) = self.0.take() else { return };
        let ProcessValue { process, value, next } = *entry;
        if process != process::id() {
            std::mem::forget(value);
        }
        drop(next);
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    /// A `PerProcess` as a forked process finds it: `value` belongs to another process.
    fn inherited<T>(value: T) -> PerProcess<T> {
        let values = PerProcess::new();
        let entry = ProcessValue { process: process::id() ^ 1, value, next: PerProcess::new() };
        assert!(values.0.set(Box::new(entry)).is_ok());
        values
    }

    #[test]
    fn get_or_init_creates_one_value_for_a_forked_process() {
        let values = inherited(1);
        assert_eq!((values.get(), values.inherited().collect::<Vec<_>>()), (None, vec![&1]));
        assert_eq!((values.get_or_init(|| 2), values.get_or_init(|| 3), values.get()), (&2, &2, Some(&2)));
        assert_eq!(values.inherited().collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn per_process_does_not_drop_an_inherited_value() {
        let (parents, own) = (Rc::new(()), Rc::new(()));
        let values = inherited(Rc::clone(&parents));
        values.get_or_init(|| Rc::clone(&own));
        drop(values);
        assert_eq!((Rc::strong_count(&parents), Rc::strong_count(&own)), (2, 1));
    }
}
