//! How many connections all test processes of this machine have on one server at one time: locked files in a folder, so that
//! waiting takes no connection, and a process that ends in whatever way gives its slots back.
//!
//! Who needs several slots takes them together, under a lock of its own (`turn`): nobody waits for one with another in his hand. The
//! one whose turn it is looks at the slots; all others wait for the turn.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::folder::folder;
use crate::backend::fnv1a;

/// The slots that are there while nobody has asked the server.
const UNKNOWN: usize = 4;

/// The slots left to others, such as a person who looks at the database.
const SPARE: usize = 2;

/// The pauses between two looks at the slots.
const PAUSES: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(5));

/// The slots of one server.
#[derive(Debug)]
pub(super) struct Slots {
    folder: PathBuf,
    /// What the server allows, as it was read or written last; 0 where nobody knows.
    capacity: AtomicUsize,
    /// The threads of this process stand in one line: a lock of a file wakes nobody in order.
    line: Mutex<Line>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Line {
    next: u64,
    served: u64,
}

/// Slots that are taken; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Taken(Vec<(usize, File)>);

/// There were not enough slots in time.
#[derive(Debug)]
pub(super) struct Busy {
    waited: Duration,
    wanted: usize,
    all: usize,
    holders: Vec<String>,
    failure: Option<String>,
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(failure) = &self.failure {
            return f.write_str(failure);
        }
        let Self { waited, wanted, all, .. } = self;
        write!(f, "{wanted} of the {all} connections for tests were not free within {waited:.1?}. Held by ")?;
        match self.holders.is_empty() {
            true => f.write_str("nobody any more"),
            false => f.write_str(&self.holders.join("; ")),
        }
    }
}

impl Slots {
    /// The one object of this process for `server`.
    pub(super) fn of(server: &str) -> Result<Arc<Self>, String> {
        static ALL: Mutex<Option<HashMap<String, Arc<Slots>>>> = Mutex::new(None);
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let all = all.get_or_insert_default();
        if let Some(slots) = all.get(server) {
            return Ok(Arc::clone(slots));
        }
        let path = folder()?.join(format!("server-{:016x}", fnv1a([server.as_bytes()])));
        let slots = Arc::new(Self::in_folder(path)?);
        all.insert(server.to_owned(), Arc::clone(&slots));
        Ok(slots)
    }

    fn in_folder(folder: PathBuf) -> Result<Self, String> {
        fs::create_dir_all(&folder).map_err(|error| format!("{} cannot be made: {error}", folder.display()))?;
        let slots = Self { folder, capacity: AtomicUsize::new(0), line: Mutex::default(), moved: Condvar::new() };
        slots.read_capacity();
        Ok(slots)
    }

    /// Remembers, for all processes, how many connections the server allows.
    pub(super) fn set_capacity(&self, connections: usize) {
        if self.capacity.swap(connections, Ordering::AcqRel) == connections {
            return;
        }
        // As a whole or not at all. Where it fails the next process asks the server again.
        let path = self.folder.join("capacity");
        let new = self.folder.join(format!("capacity-{}", std::process::id()));
        let written = fs::write(&new, connections.to_string()).and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            log::debug!(target: "diesel_session::testing", "{} cannot be written: {error}", path.display());
        }
    }

    /// Takes `wanted` slots together, or all there are; waits in turn until `deadline`. `label` tells others what they are for.
    pub(super) fn take(&self, wanted: usize, label: &str, deadline: Instant) -> Result<Taken, Busy> {
        let started = Instant::now();
        let busy = |failure: Option<String>| {
            let all = self.count();
            let (waited, wanted) = (started.elapsed(), wanted.min(all));
            Busy { waited, wanted, all, holders: self.holders(), failure }
        };
        let ticket = self.line_up(deadline).ok_or_else(|| busy(None))?;
        let outcome = self.take_in_turn(wanted, label, deadline);
        drop(ticket);
        match outcome {
            Ok(Some(taken)) => Ok(taken),
            Ok(None) => Err(busy(None)),
            Err(error) => Err(busy(Some(error))),
        }
    }

    /// The same where they are free at once.
    pub(super) fn try_take(&self, wanted: usize, label: &str) -> Option<Taken> {
        let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if line.next != line.served {
            return None;
        }
        drop(line);
        self.take_in_turn(wanted, label, Instant::now()).ok().flatten()
    }

    /// Waits until no other process does what `what` names.
    pub(super) fn turn_for(&self, what: &str) -> Result<File, String> {
        let path = self.folder.join(format!("making-{what}"));
        let file = File::create(&path).and_then(|file| file.lock().map(|()| file));
        file.map_err(|error| format!("{} cannot be locked: {error}", path.display()))
    }

    /// How many there are.
    fn count(&self) -> usize {
        match self.capacity.load(Ordering::Acquire) {
            0 => UNKNOWN,
            capacity => capacity.saturating_sub(SPARE).max(1),
        }
    }

    fn read_capacity(&self) {
        let text = fs::read_to_string(self.folder.join("capacity")).unwrap_or_default();
        if let Ok(capacity) = text.trim().parse() {
            self.capacity.store(capacity, Ordering::Release);
        }
    }

    /// The place at the head of this process's line.
    fn line_up(&self, deadline: Instant) -> Option<Ticket<'_>> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = line.next;
        line.next += 1;
        while line.served != ticket {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // Its number still comes up: who is served next steps over it.
                drop(line);
                self.step_over(ticket);
                return None;
            }
            line = self.moved.wait_timeout(line, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(Ticket(self))
    }

    /// A thread that has left the line lets its number pass.
    fn step_over(&self, ticket: u64) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        while line.served != ticket {
            line = self.moved.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        line.served += 1;
        drop(line);
        self.moved.notify_all();
    }

    fn take_in_turn(&self, wanted: usize, label: &str, deadline: Instant) -> Result<Option<Taken>, String> {
        let unusable = |path: &Path, error: &std::io::Error| format!("{} cannot be used: {error}", path.display());
        let path = self.folder.join("turn");
        let turn = File::create(&path).map_err(|error| unusable(&path, &error))?;
        let mut pause = PAUSES.0;
        loop {
            match turn.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(error)) => return Err(unusable(&path, &error)),
                Err(TryLockError::WouldBlock) => {}
            }
            if !sleep(&mut pause, deadline) {
                return Ok(None);
            }
        }
        let mut taken = Taken(Vec::new());
        let mut pause = PAUSES.0;
        loop {
            self.read_capacity();
            let count = self.count();
            for number in 0..count {
                if taken.len() == wanted.min(count) {
                    break;
                }
                if !taken.numbers().any(|has| has == number) {
                    taken.0.extend(self.try_slot(number, label)?.map(|file| (number, file)));
                }
            }
            if taken.len() >= wanted.min(count) {
                return Ok(Some(taken));
            }
            // It keeps what it has meanwhile: nobody else looks, as this is its turn.
            if !sleep(&mut pause, deadline) {
                return Ok(None);
            }
        }
    }

    fn try_slot(&self, number: usize, label: &str) -> Result<Option<File>, String> {
        let path = self.slot(number);
        let unusable = |error| format!("{} cannot be used: {error}", path.display());
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        // Only for messages, so that it does not matter where it fails.
        let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "process {} ({label})", std::process::id()));
        Ok(Some(file))
    }

    /// Who has the slots, each with how many.
    fn holders(&self) -> Vec<String> {
        let mut holders: Vec<(String, usize)> = Vec::new();
        for number in 0..self.count() {
            let Ok(mut file) = File::open(self.slot(number)) else { continue };
            if file.try_lock_shared().is_ok() {
                continue;
            }
            let mut text = String::new();
            let _ = file.read_to_string(&mut text);
            match holders.iter_mut().find(|(holder, _)| *holder == text) {
                Some((_, slots)) => *slots += 1,
                None => holders.push((text, 1)),
            }
        }
        holders.into_iter().map(|(holder, slots)| format!("{holder}: {slots}")).collect()
    }

    fn slot(&self, number: usize) -> PathBuf {
        self.folder.join(format!("slot-{number}"))
    }
}

impl Taken {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Their numbers, which nobody else on this machine has meanwhile.
    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|(number, _)| *number)
    }

    /// Gives so many of them to another owner.
    pub(super) fn split_off(&mut self, slots: usize) -> Self {
        Self(self.0.split_off(self.0.len().saturating_sub(slots)))
    }
}

/// The head of the line; drop lets the next one go.
struct Ticket<'s>(&'s Slots);

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.0.line.lock().unwrap_or_else(PoisonError::into_inner).served += 1;
        self.0.moved.notify_all();
    }
}

/// Sleeps a little more than the last time; false when `deadline` has come.
fn sleep(pause: &mut Duration, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return false;
    }
    std::thread::sleep(left.min(*pause));
    *pause = (*pause * 2).min(PAUSES.1);
    true
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn slots(name: &str, capacity: usize) -> Arc<Slots> {
        let folder = tempfile::tempdir().expect("a temporary folder").keep().join(name);
        let slots = Slots::in_folder(folder).expect("it can be made");
        slots.set_capacity(capacity);
        Arc::new(slots)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn all_or_nothing_and_nobody_waits_for_ever() {
        let slots = slots("many", 7 + SPARE);
        let held = AtomicUsize::new(0);
        thread::scope(|scope| {
            for n in 0..12 {
                let (slots, held) = (&slots, &held);
                scope.spawn(move || {
                    for _ in 0..20 {
                        let taken = slots.take(1 + n % 4, "test", soon()).expect("in time");
                        let now = held.fetch_add(taken.len(), Ordering::SeqCst) + taken.len();
                        assert!(now <= 7 && taken.len() == 1 + n % 4);
                        thread::yield_now();
                        held.fetch_sub(taken.len(), Ordering::SeqCst);
                        drop(taken);
                    }
                });
            }
        });
    }

    #[test]
    fn who_waits_in_vain_is_told_who_has_them() {
        let slots = slots("busy", 3 + SPARE);
        let mut taken = slots.take(9, "the first test", soon()).expect("all there are");
        assert_eq!(taken.len(), 3);
        let refused = slots.take(1, "another", Instant::now() + Duration::from_millis(20)).expect_err("there are none");
        let text = refused.to_string();
        assert!(text.contains("the first test") && text.contains(": 3") && text.contains("1 of the 3"), "{text}");
        let part = taken.split_off(1);
        drop(taken);
        let two = slots.try_take(2, "another").expect("two are free");
        assert!(slots.try_take(1, "another").is_none());
        assert_eq!(part.numbers().chain(two.numbers()).collect::<std::collections::HashSet<_>>().len(), 3);
    }

    #[test]
    fn who_leaves_the_line_stops_nobody() {
        let slots = slots("line", 1 + SPARE);
        let taken = slots.take(1, "first", soon()).expect("it is free");
        thread::scope(|scope| {
            let waits = |limit: u64| {
                let slots = &slots;
                scope.spawn(move || slots.take(1, "waits", Instant::now() + Duration::from_millis(limit)).is_ok())
            };
            let (patient, hasty) = (waits(20_000), waits(30));
            assert!(!hasty.join().expect("no panic") || slots.count() > 1);
            drop(taken);
            assert!(patient.join().expect("no panic"));
        });
        assert!(slots.try_take(1, "last").is_some());
    }
}
