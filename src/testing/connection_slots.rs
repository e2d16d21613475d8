//! The limit of the connections that all test processes of one machine open on one server. The limit consists of
//! numbered slots, and each slot is a lock file. A waiting thread needs no connection, and the slots of a process are
//! released when the process ends, also after a kill.
//!
//! A thread acquires all its slots at once or none, and only one thread of the machine tries at a time: it holds the
//! turnstile. So no thread holds some slots while it waits for the others, and threads that need few slots cannot
//! starve a thread that needs many.
//!
//! The folder must not be cleared while tests run: the holders of deleted files do not exclude the holders of the new
//! files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use super::lock_file::{self, LockFile, PAUSE, holder_of};
use super::shared_folder::{make_inside, shared_folder};
use crate::dialect::fnv1a;
use crate::wording::log_line;

/// The number of slots of a server whose connection limit is not known yet.
const SLOTS_OF_UNKNOWN_SERVER: usize = 4;
/// The number of connections of a server that are left to other programs, such as an administrator's console.
const LEFT_TO_OTHERS: usize = 2;

/// The slots of one server.
#[derive(Debug)]
pub(super) struct ConnectionSlots {
    pub(super) server: String,
    path: PathBuf,
}

/// Slots that this process holds, each with its number. The drop releases them.
#[derive(Debug)]
pub(super) struct HeldSlots(Vec<(usize, LockFile)>);

impl ConnectionSlots {
    /// The slots of the server with this key. All processes share its folder. The key is not secret.
    pub(super) fn of_server(server: &str) -> Result<Self, String> {
        Self::in_folder(shared_folder()?, server)
    }

    fn in_folder(folder: &Path, server: &str) -> Result<Self, String> {
        let path = folder.join(format!("server-{:016x}", fnv1a([server.as_bytes()])));
        let name = path.join("server");
        let created = make_inside(&path).and_then(|()| if name.exists() { Ok(()) } else { overwrite(&name, server) });
        created
            .map_err(|error| format!("tests cannot share the connections of {server}: {}: {error}", path.display()))?;
        Ok(Self { server: server.to_owned(), path })
    }

    /// The connection limit of the server, as the last process that asked the server has recorded it.
    fn capacity(&self) -> Option<usize> {
        let file = lock_file::open(&self.path.join("capacity"), File::options().read(true)).ok()?;
        lock_file::read_text(&file).ok()?.trim().parse().ok()
    }

    /// Records the connection limit of the server for all processes.
    pub(super) fn set_capacity(&self, connections: usize) {
        // The text always has the same length, so that one write replaces all of it.
        if self.capacity() != Some(connections)
            && let Err(error) = overwrite(&self.path.join("capacity"), &format!("{connections:20}"))
        {
            log_line!(
                warn,
                "diesel_session::testing",
                "how many connections {} takes cannot be told to other tests: {error}",
                self.server
            );
        }
    }

    fn usable(&self) -> usize {
        self.capacity().map_or(SLOTS_OF_UNKNOWN_SERVER, |connections| connections.saturating_sub(LEFT_TO_OTHERS).max(1))
    }

    /// A lock file that all processes of this machine share.
    pub(super) fn file(&self, name: &str) -> io::Result<LockFile> {
        LockFile::open(&self.path.join(name))
    }

    fn turnstile(&self) -> PathBuf {
        self.path.join("turn")
    }

    fn slot(&self, number: usize) -> PathBuf {
        self.path.join(format!("slot-{number}"))
    }

    /// Whether a thread on this machine waits for slots.
    pub(super) fn has_waiters(&self) -> bool {
        holder_of(&self.turnstile()).is_some()
    }

    /// Acquires `wanted` slots at once, or all slots if there are fewer, and waits for them until `deadline`. `label`
    /// names their purpose. If the deadline has passed already, there is one attempt.
    ///
    /// # Errors
    /// The reason, with the advice `to_wait` if other tests hold the slots.
    pub(super) fn acquire(
        &self,
        wanted: usize,
        label: &str,
        deadline: Instant,
        to_wait: &str,
    ) -> Result<HeldSlots, String> {
        match self.acquire_in_turn(wanted, label, deadline) {
            Ok(Some(held)) => Ok(held),
            Ok(None) => Err(format!("{}. {to_wait}", self.shortage(wanted))),
            Err(error) => Err(format!(
                "the files by which tests share the connections of {} cannot be used: {error}. Make the folder of the tests \
                 usable, or name another with DIESEL_SESSION_TEST_DIR",
                self.server
            )),
        }
    }

    /// Acquires slots without waiting. The result is `None` also if another thread is in the turnstile.
    pub(super) fn try_acquire(&self, wanted: usize, label: &str) -> Option<HeldSlots> {
        self.acquire_in_turn(wanted, label, Instant::now()).ok().flatten()
    }

    fn acquire_in_turn(&self, wanted: usize, label: &str, deadline: Instant) -> io::Result<Option<HeldSlots>> {
        let turnstile = LockFile::open(&self.turnstile())?;
        if !turnstile.lock_until(deadline)? {
            return Ok(None);
        }
        turnstile.write_holder(label)?;
        let mut files: Vec<LockFile> = Vec::new();
        loop {
            let usable = self.usable();
            let mut locked = Vec::new();
            for number in 0..usable {
                if locked.len() == wanted {
                    break;
                }
                if number == files.len() {
                    files.push(LockFile::open(&self.slot(number))?);
                }
                if files[number].try_lock()? {
                    locked.push(number);
                }
            }
            if locked.len() == wanted.min(usable) {
                let held = files.into_iter().enumerate().filter(|(number, _)| locked.contains(number));
                let held = HeldSlots(held.collect());
                held.0.iter().try_for_each(|(_, file)| file.write_holder(label))?;
                return Ok(Some(held));
            }
            locked.into_iter().try_for_each(|number| files[number].unlock())?;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            thread::sleep(PAUSE);
        }
    }

    /// The text that names the holders of the slots, each with the number of its slots, and the holder of the
    /// turnstile, which gets the next slots.
    fn shortage(&self, wanted: usize) -> String {
        let usable = self.usable();
        let (server, wanted) = (&self.server, wanted.min(usable));
        let mut holders: BTreeMap<String, usize> = BTreeMap::new();
        for holder in (0..usable).filter_map(|number| holder_of(&self.slot(number))) {
            *holders.entry(holder).or_default() += 1;
        }
        let holders: Vec<String> = holders.iter().map(|(holder, slots)| format!("{slots} by {holder}")).collect();
        let held = if holders.is_empty() { String::new() } else { format!("; held: {}", holders.join(", ")) };
        let next = holder_of(&self.turnstile()).map_or_else(String::new, |holder| format!("; next is {holder}"));
        format!(
            "tests on this machine share {usable} connections of {server}, and {wanted} did not become free in time{held}{next}"
        )
    }
}

impl HeldSlots {
    /// The number of slots. It is less than the wanted number if the server has fewer.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The numbers of the slots, from 0. No other holder on this machine has the same numbers for this server.
    pub(super) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.0.iter().map(|(number, _)| *number)
    }

    /// Moves `count` slots, or all if there are fewer, into a new object.
    pub(super) fn split_off(&mut self, count: usize) -> Self {
        Self(self.0.split_off(self.0.len().saturating_sub(count)))
    }
}

/// Writes a text into a file that may exist.
fn overwrite(path: &Path, text: &str) -> io::Result<()> {
    lock_file::open(path, File::options().write(true).create(true).truncate(false))?.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::{self, OpenOptions};
    use std::process::{Child, Command, Stdio};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const CHILD: &str = "DIESEL_SESSION_SLOTS_CHILD";

    fn seven_slots() -> (TempDir, ConnectionSlots) {
        let temp = tempfile::tempdir().unwrap();
        let slots = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
        slots.set_capacity(9);
        (temp, slots)
    }

    fn acquire(slots: &ConnectionSlots, wanted: usize, label: &str, deadline: Instant) -> Result<HeldSlots, String> {
        slots.acquire(wanted, label, deadline, "Wait")
    }

    fn seconds_from_now(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    /// Runs the test `slots_child_process` in a separate process. `task` selects the action of the process.
    fn child(temp: &TempDir, task: &str) -> Child {
        let mut program = Command::new(std::env::current_exe().unwrap());
        program.args(["--exact", "testing::connection_slots::tests::slots_child_process"]).env(CHILD, task);
        program.env("DIESEL_SESSION_TEST_DIR", temp.path()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn slots_child_process() {
        let Ok(task) = std::env::var(CHILD) else { return };
        let mut events =
            OpenOptions::new().create(true).append(true).open(shared_folder().unwrap().join("events")).unwrap();
        let mut record = |sign, numbers: Vec<usize>| {
            let lines: String = numbers.iter().map(|number| format!("{sign}{number}\n")).collect();
            events.write_all(lines.as_bytes()).unwrap();
        };
        let slots = ConnectionSlots::of_server("a server").unwrap();
        if task == "all" {
            let held = acquire(&slots, 99, &task, seconds_from_now(20)).unwrap();
            record('+', held.numbers().collect());
            thread::sleep(Duration::from_secs(60));
        }
        let held = acquire(&slots, 3, &task, seconds_from_now(60)).unwrap();
        record('+', held.numbers().collect());
        thread::sleep(Duration::from_millis(20));
        record('-', held.numbers().collect());
    }

    #[test]
    fn twenty_processes_share_seven_slots() {
        let (temp, _slots) = seven_slots();
        let children: Vec<Child> = (0..20).map(|number| child(&temp, &number.to_string())).collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        let (mut held, mut most, mut times) = (BTreeSet::new(), 0, 0);
        for event in fs::read_to_string(temp.path().join("events")).unwrap().lines() {
            match event.split_at(1) {
                ("+", number) => assert!(held.insert(number.to_owned()), "{number} twice"),
                (_, number) => assert!(held.remove(number)),
            }
            times += 1;
            most = most.max(held.len());
        }
        assert_eq!((held.len(), times), (0, 20 * 3 * 2));
        assert!((3..=7).contains(&most), "{most}");
    }

    #[test]
    fn slots_of_a_killed_process_are_free_at_once() {
        let (temp, slots) = seven_slots();
        let mut killed = child(&temp, "all");
        let end = seconds_from_now(20);
        while !fs::read_to_string(temp.path().join("events")).is_ok_and(|events| events.lines().count() == 7) {
            assert!(Instant::now() < end, "the child is not there");
            thread::sleep(SHORT);
        }
        let error = acquire(&slots, 1, "me", Instant::now()).unwrap_err();
        killed.kill().unwrap();
        killed.wait().unwrap();
        assert_eq!(slots.try_acquire(7, "me").map(|held| held.len()), Some(7));
        assert!(error.ends_with(&format!("; held: 7 by process {} (`all`). Wait", killed.id())), "{error}");
    }

    #[test]
    fn slots_are_acquired_all_at_once_without_deadlock() {
        let (_temp, slots) = seven_slots();
        let (in_use, turns) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for thread in 0..8 {
                let (slots, in_use, turns) = (&slots, &in_use, &turns);
                scope.spawn(move || {
                    for round in 0..20 {
                        let held = acquire(slots, 1 + (thread + round) % 7, "some", seconds_from_now(60)).unwrap();
                        assert_eq!(held.len(), 1 + (thread + round) % 7);
                        assert!(in_use.fetch_add(held.len(), Ordering::SeqCst) + held.len() <= 7);
                        thread::yield_now();
                        in_use.fetch_sub(held.len(), Ordering::SeqCst);
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(turns.into_inner(), 160);
    }

    #[test]
    fn acquire_in_the_queue_respects_the_deadline_and_names_the_holders() {
        let (temp, slots) = seven_slots();
        // The object that another process would have.
        let other = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
        let _three = acquire(&slots, 3, "orders", seconds_from_now(1)).unwrap();
        let _two = acquire(&other, 2, "users", seconds_from_now(1)).unwrap();
        let begin = Instant::now();
        thread::scope(|scope| {
            let first = scope.spawn(|| acquire(&slots, 4, "many", begin + Duration::from_millis(300)).unwrap_err());
            let waits =
                |slots: &ConnectionSlots| holder_of(&slots.turnstile()).is_some_and(|holder| holder.contains("many"));
            while !waits(&slots) {
                thread::sleep(SHORT);
            }
            assert!(slots.try_acquire(1, "few").is_none() && other.try_acquire(1, "few").is_none());
            for behind in [&slots, &other] {
                let error = acquire(behind, 1, "few", begin + Duration::from_millis(100)).unwrap_err();
                assert!(error.ends_with("; next is this process (`many`). Wait"), "{error}");
            }
            assert!(!first.is_finished(), "each caller waits until its own deadline");
            let error = first.join().unwrap();
            assert!(begin.elapsed() >= Duration::from_millis(300));
            let text = "tests on this machine share 7 connections of a server, and 4 did not become free in time; \
                        held: 3 by this process (`orders`), 2 by this process (`users`). Wait";
            assert_eq!(error, text);
        });
        assert_eq!(acquire(&slots, 2, "rest", seconds_from_now(1)).unwrap().numbers().collect::<Vec<_>>(), [5, 6]);
    }

    #[test]
    fn process_with_many_threads_lets_a_process_with_few_threads_pass() {
        let (temp, slots) = seven_slots();
        let other = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
        let (done, turns, mut meanwhile) = (AtomicUsize::new(0), AtomicUsize::new(0), 0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while done.load(Ordering::SeqCst) == 0 {
                        let _taken = acquire(&slots, 3, "many", seconds_from_now(60)).unwrap();
                        turns.fetch_add(1, Ordering::SeqCst);
                        thread::sleep(SHORT);
                    }
                });
            }
            for _ in 0..20 {
                thread::sleep(10 * SHORT);
                let before = turns.load(Ordering::SeqCst);
                let _taken = acquire(&other, 3, "few", seconds_from_now(60)).unwrap();
                meanwhile += turns.load(Ordering::SeqCst) - before;
            }
            done.store(1, Ordering::SeqCst);
        });
        // A thread of 9 is the next one after about 8 turns.
        assert!(meanwhile < 20 * 20, "{meanwhile}");
    }

    #[test]
    fn split_off_moves_slots_to_a_new_object() {
        let (_temp, slots) = seven_slots();
        let mut all = acquire(&slots, 100, "all", seconds_from_now(1)).unwrap();
        let part = all.split_off(3);
        assert_eq!((all.len(), part.numbers().collect::<Vec<_>>()), (4, vec![4, 5, 6]));
        assert_eq!(all.split_off(0).len(), 0);
        drop(all);
        assert!(slots.try_acquire(5, "five").is_none());
        let again = slots.try_acquire(4, "four").unwrap();
        drop((part, again));
        assert_eq!(slots.try_acquire(7, "all").unwrap().len(), 7);
    }

    #[test]
    fn capacity_is_shared_by_all_objects_of_a_server() {
        let temp = tempfile::tempdir().unwrap();
        let slots = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
        assert_eq!((slots.capacity(), slots.usable()), (None, 4));
        for (capacity, usable) in [(20, 18), (3, 1), (0, 1)] {
            slots.set_capacity(capacity);
            let other = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
            assert_eq!((other.capacity(), other.usable()), (Some(capacity), usable));
        }
        assert_eq!(ConnectionSlots::in_folder(temp.path(), "another").unwrap().capacity(), None);
        assert_eq!(fs::read_to_string(slots.path.join("server")).unwrap(), "a server");
    }
}
