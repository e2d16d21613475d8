//! What every process has for itself. Memory is inherited by a fork; connections are not to be used by both sides, and
//! threads and the holders of locks do not exist in the new process.

use std::cell::Cell;
use std::process;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// No fork is over so soon: before it returns in the new process all the tables of the memory have been copied.
const BRIEF: Duration = Duration::from_micros(10);

/// The number of this process. `now` is this moment.
///
/// Asking the system costs more than a whole loan of a connection. A fork is called by the thread that finds itself in the new
/// process, so what this thread was told a moment ago is still true.
#[inline]
pub(crate) fn id_at(now: Instant) -> u32 {
    thread_local! {
        static TOLD: Cell<Option<(Instant, u32)>> = const { Cell::new(None) };
    }
    match TOLD.get() {
        Some((at, id)) if now.saturating_duration_since(at) < BRIEF => id,
        _ => {
            let id = process::id();
            TOLD.set(Some((now, id)));
            id
        }
    }
}

/// A value of each process: after a fork the new process makes its own and leaves its parent's as it found it. That one is never
/// dropped there.
#[derive(Debug)]
pub(crate) struct PerProcess<T>(OnceLock<Box<Generation<T>>>);

#[derive(Debug)]
struct Generation<T> {
    process: u32,
    value: T,
    next: PerProcess<T>,
}

impl<T> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// This process's own, if it has one.
    pub(crate) fn get(&self) -> Option<&T> {
        self.of(process::id())
    }

    /// The same at a moment that the caller has just read from the clock.
    #[inline]
    pub(crate) fn get_at(&self, now: Instant) -> Option<&T> {
        self.of(id_at(now))
    }

    #[inline]
    fn of(&self, me: u32) -> Option<&T> {
        let mut generation = self.0.get()?;
        while generation.process != me {
            generation = generation.next.0.get()?;
        }
        Some(&generation.value)
    }

    /// This process's own, made now if it has none.
    pub(crate) fn get_or_init(&self, make: impl Fn() -> T) -> &T {
        let me = process::id();
        let mut place = self;
        loop {
            let new = || Box::new(Generation { process: me, value: make(), next: PerProcess::new() });
            let generation = place.0.get_or_init(new);
            if generation.process == me {
                return &generation.value;
            }
            place = &generation.next;
        }
    }

    /// Those of the processes that this one was forked from. Their locks may be held by threads that do not exist here.
    pub(crate) fn inherited(&self) -> impl Iterator<Item = &T> {
        let me = process::id();
        let each = std::iter::successors(self.0.get(), |generation| generation.next.0.get());
        each.filter(move |generation| generation.process != me).map(|generation| &generation.value)
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let Some(generation) = self.0.take() else { return };
        let Generation { process, value, next } = *generation;
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

    /// As after a fork: `value` is another process's.
    fn inherited<T>(value: T) -> PerProcess<T> {
        let each = PerProcess::new();
        let generation = Generation { process: process::id() ^ 1, value, next: PerProcess::new() };
        assert!(each.0.set(Box::new(generation)).is_ok());
        each
    }

    #[test]
    fn a_process_makes_its_own_once() {
        let each = inherited(1);
        assert_eq!((each.get(), each.inherited().collect::<Vec<_>>()), (None, vec![&1]));
        assert_eq!((each.get_or_init(|| 2), each.get_or_init(|| 3), each.get()), (&2, &2, Some(&2)));
        assert_eq!(each.inherited().collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn what_is_inherited_is_not_dropped() {
        let (parents, own) = (Rc::new(()), Rc::new(()));
        let each = inherited(Rc::clone(&parents));
        each.get_or_init(|| Rc::clone(&own));
        drop(each);
        assert_eq!((Rc::strong_count(&parents), Rc::strong_count(&own)), (2, 1));
    }
}
