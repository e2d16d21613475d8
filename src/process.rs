//! Values that belong to one process. A forked process inherits the memory of its parent, but both processes must not
//! use the same connections, and the new process has neither the other threads nor the holders of locks.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};

use forkguard::Guard;

use crate::sync::Mutex;

/// The process that created a value. `None` is another process, in tests.
///
/// A fork raises a counter in the new process. To ask the system for the id of the process costs as much as half a
/// checkout.
#[derive(Debug)]
pub(crate) struct Process(Option<Guard>);

impl Process {
    pub(crate) fn this() -> Self {
        Self(Some(Guard::default()))
    }

    #[inline]
    pub(crate) fn is_this(&self) -> bool {
        self.0.as_ref().is_some_and(|guard| !guard.clone().detected_fork())
    }
}

/// One value for each process. After a fork the new process creates its own value. It never drops the value of its
/// parent.
#[derive(Debug)]
pub(crate) struct PerProcess<T>(OnceLock<Box<ProcessValue<T>>>);

/// The value of one process, and the values of the processes that were forked later.
#[derive(Debug)]
struct ProcessValue<T> {
    process: Process,
    value: T,
    next: PerProcess<T>,
}

impl<T> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The value of this process, if the process has created one.
    #[inline]
    pub(crate) fn get(&self) -> Option<&T> {
        let mut entry = self.0.get()?;
        while !entry.process.is_this() {
            entry = entry.next.0.get()?;
        }
        Some(&entry.value)
    }

    /// The value of this process. `create` makes the value if the process has none.
    pub(crate) fn get_or_init(&self, create: impl Fn() -> T) -> &T {
        let mut list = self;
        loop {
            let new = || Box::new(ProcessValue { process: Process::this(), value: create(), next: PerProcess::new() });
            let entry = list.0.get_or_init(new);
            if entry.process.is_this() {
                return &entry.value;
            }
            list = &entry.next;
        }
    }

    /// The values of the processes from which this process was forked. Threads that do not exist in this process may
    /// hold their locks.
    pub(crate) fn inherited(&self) -> impl Iterator<Item = &T> {
        let entries = std::iter::successors(self.0.get(), |entry| entry.next.0.get());
        entries.filter(|entry| !entry.process.is_this()).map(|entry| &entry.value)
    }
}

/// Values of this process that are shared by their names for as long as they are used.
pub(crate) struct SharedByName<T>(PerProcess<Mutex<HashMap<String, Weak<T>>>>);

impl<T> SharedByName<T> {
    pub(crate) const fn new() -> Self {
        Self(PerProcess::new())
    }

    /// The value with this name. `create` makes it if there is none.
    pub(crate) fn get_or_create(&self, name: &str, create: impl FnOnce() -> Arc<T>) -> Arc<T> {
        let mut values = self.0.get_or_init(Mutex::default).lock();
        if let Some(value) = values.get(name).and_then(Weak::upgrade) {
            return value;
        }
        values.retain(|_, value| value.strong_count() > 0);
        let value = create();
        values.insert(name.to_owned(), Arc::downgrade(&value));
        value
    }

    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        self.0.get_or_init(Mutex::default).lock().values().filter_map(Weak::upgrade).collect()
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        let Some(entry) = self.0.take() else { return };
        let ProcessValue { process, value, next } = *entry;
        if !process.is_this() {
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
        let entry = ProcessValue { process: Process(None), value, next: PerProcess::new() };
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
