//! The limit of the connections that all test processes of one machine open on one server. The limit consists of
//! numbered slots, and each slot is a lock file. A waiting thread needs no connection, and the slots of a process are
//! released when the process ends, also after a kill.
//!
//! A thread acquires all its slots at once or none, and only one thread of the machine tries at a time: it holds the
//! turnstile. So no thread holds some slots while it waits for the others, and threads that need few slots cannot
//! starve a thread that needs many. The threads of a process queue, and only the first one enters the turnstile. File
//! locks have no timeout, so the first thread polls.
//!
//! The folder must not be cleared while tests run: the holders of deleted files do not exclude the holders of the new
//! files.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, fs, io, process};

use parking_lot::Mutex;

use super::lock_file::{self, LockFile, LockHolder, holder_of};
use super::shared_folder::{make_inside, shared_folder};
use super::slot_queue::{SlotQueue, SlotWaiter};
use crate::dialect::fnv1a;
use crate::process::PerProcess;

/// The number of slots of a server whose connection limit is not known yet.
const SLOTS_OF_UNKNOWN_SERVER: usize = 4;
/// The number of connections of a server that are left to other programs, such as an administrator's console.
const LEFT_TO_OTHERS: usize = 2;
/// If other processes wait, a process that has just left the turnstile does not enter it again for this time. Each
/// waiting process polls at least once in this time.
const TURNSTILE_PAUSE: Duration = Duration::from_millis(6);
/// How many existing files [`replace_file`] accepts before it gives up.
const MAX_REPLACE_ATTEMPTS: usize = 100;

/// The lock file of the turnstile.
const TURNSTILE: &str = "turn";

/// The slots of one server.
#[derive(Debug)]
pub(crate) struct ConnectionSlots {
    server: String,
    path: PathBuf,
    queue: PerProcess<SlotQueue>,
}

/// Slots that this process holds. The drop releases them.
#[derive(Debug)]
pub(crate) struct HeldSlots {
    slots: Arc<ConnectionSlots>,
    held: Vec<(usize, LockFile)>,
    process: u32,
}

/// The reason why slots could not be acquired.
#[derive(Debug)]
pub(crate) struct SlotsUnavailable {
    pub(crate) server: String,
    pub(crate) wanted: usize,
    pub(crate) usable: usize,
    /// The holders of slots, each with the number of its slots.
    pub(crate) holders: Vec<(LockHolder, usize)>,
    /// The process in the turnstile, which gets the next slots.
    pub(crate) next: Option<LockHolder>,
    /// The error of the file system, if that is the reason.
    pub(crate) io_error: Option<io::Error>,
}

impl ConnectionSlots {
    /// The slots of the server with this key. Each process has one object for a server, and all processes share its
    /// folder. The key is not secret.
    pub(crate) fn of_server(server: &str) -> Result<Arc<Self>, String> {
        static ALL: PerProcess<Mutex<HashMap<String, Arc<ConnectionSlots>>>> = PerProcess::new();
        let mut all = ALL.get_or_init(Mutex::default).lock();
        if let Some(known) = all.get(server) {
            return Ok(Arc::clone(known));
        }
        let new = Self::in_folder(shared_folder()?, server)?;
        all.insert(server.to_owned(), Arc::clone(&new));
        Ok(new)
    }

    /// The connection limit of the server, as the last process that asked the server has recorded it.
    pub(crate) fn capacity(&self) -> Option<usize> {
        let file = lock_file::open(&self.path.join("capacity"), OpenOptions::new().read(true)).ok()?;
        lock_file::read_text(&file).ok()?.trim().parse().ok()
    }

    /// Records the connection limit of the server for all processes.
    pub(crate) fn set_capacity(&self, connections: usize) {
        if self.capacity() != Some(connections)
            && let Err(error) = replace_file(&self.path.join("capacity"), &connections.to_string())
        {
            crate::wording::log_line!(
                warn,
                "diesel_session::testing",
                "how many connections {} takes cannot be told to other tests: {error}",
                self.server
            );
        }
    }

    /// A lock file that all processes of this machine share.
    pub(crate) fn file(&self, name: &str) -> io::Result<LockFile> {
        LockFile::open(&self.path.join(name))
    }

    /// Acquires `wanted` slots at once, or all slots if there are fewer, and waits for them until `deadline`. `label`
    /// names their purpose. If the deadline has passed already, there is one attempt.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        wanted: usize,
        label: &str,
        deadline: Instant,
    ) -> Result<HeldSlots, SlotsUnavailable> {
        match self.acquire_in_turn(wanted, label, deadline) {
            Ok(Some(held)) => Ok(held),
            Ok(None) => Err(self.unavailable(wanted, None)),
            Err(io_error) => Err(self.unavailable(wanted, Some(io_error))),
        }
    }

    /// Whether a thread on this machine waits for slots. The method locks the turnstile in shared mode for a moment.
    pub(crate) fn probe_waiters(&self) -> bool {
        let permit = LockFile::open(&self.path.join(TURNSTILE));
        permit.and_then(|permit| permit.try_lock_shared()).is_ok_and(|is_free| !is_free)
    }

    /// Acquires slots without waiting. The result is `None` also if another thread is in the turnstile or queues.
    pub(crate) fn try_acquire(self: &Arc<Self>, wanted: usize, label: &str) -> Option<HeldSlots> {
        self.acquire_in_turn(wanted, label, Instant::now()).ok().flatten()
    }
}

impl HeldSlots {
    /// The number of slots. It is less than the wanted number if the server has fewer.
    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// The numbers of the slots, from 0. No other holder on this machine has the same numbers for this server.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.held.iter().map(|(number, _)| *number)
    }

    /// Moves `count` slots, or all if there are fewer, into a new object.
    pub(crate) fn split_off(&mut self, count: usize) -> Self {
        let held = self.held.split_off(self.held.len().saturating_sub(count));
        Self { slots: Arc::clone(&self.slots), held, process: self.process }
    }
}

impl Drop for HeldSlots {
    fn drop(&mut self) {
        // After a fork the open files also belong to the parent process, which still holds the slots.
        if self.process == process::id() {
            self.slots.queue().release(self.held.drain(..));
        }
    }
}

impl SlotsUnavailable {
    /// The text, with advice. `patience` is the name of the option for the waiting time.
    pub(super) fn with_advice(&self, patience: &str) -> String {
        match self.io_error {
            Some(_) => {
                format!("{self}. Make the folder of the tests usable, or name another with DIESEL_SESSION_TEST_DIR")
            }
            None => format!("{self}. Run fewer tests at once, or wait longer ({patience})"),
        }
    }
}

impl fmt::Display for SlotsUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, wanted, usable, holders, next, io_error } = self;
        if let Some(io_error) = io_error {
            return write!(f, "the files by which tests share the connections of {server} cannot be used: {io_error}");
        }
        write!(
            f,
            "tests on this machine share {usable} connections of {server}, and {wanted} did not become free in time"
        )?;
        for (index, (holder, slots)) in holders.iter().enumerate() {
            write!(f, "{} {slots} by {holder}", if index == 0 { "; held:" } else { "," })?;
        }
        match next {
            Some(holder) => write!(f, "; next is {holder}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for SlotsUnavailable {}

/// The right to acquire slots, which one thread of the machine has at a time. The drop releases it.
struct TurnstilePermit<'q> {
    queue: &'q SlotQueue,
    file: LockFile,
}

impl ConnectionSlots {
    fn in_folder(folder: &Path, server: &str) -> Result<Arc<Self>, String> {
        let path = folder.join(format!("server-{:016x}", fnv1a([server.as_bytes()])));
        let name = path.join("server");
        let created =
            make_inside(&path).and_then(|()| if name.exists() { Ok(()) } else { replace_file(&name, server) });
        created
            .map_err(|error| format!("tests cannot share the connections of {server}: {}: {error}", path.display()))?;
        Ok(Arc::new(Self { server: server.to_owned(), path, queue: PerProcess::new() }))
    }

    fn queue(&self) -> &SlotQueue {
        self.queue.get_or_init(SlotQueue::default)
    }

    fn usable(&self) -> usize {
        self.capacity().map_or(SLOTS_OF_UNKNOWN_SERVER, |connections| connections.saturating_sub(LEFT_TO_OTHERS).max(1))
    }

    fn slot_path(&self, number: usize) -> PathBuf {
        self.path.join(format!("slot-{number}"))
    }

    fn acquire_in_turn(
        self: &Arc<Self>,
        wanted: usize,
        label: &str,
        deadline: Instant,
    ) -> io::Result<Option<HeldSlots>> {
        let queue = self.queue();
        let Some(_waiter) = SlotWaiter::wait_until_first(queue, deadline) else { return Ok(None) };
        let Some(permit) = self.pass_turnstile(queue, deadline)? else { return Ok(None) };
        let mut pause = Duration::ZERO;
        loop {
            if let Some(held) = self.lock_all(queue, wanted, label)? {
                return Ok(Some(HeldSlots { slots: Arc::clone(self), held, process: process::id() }));
            }
            if pause.is_zero() {
                permit.file.write_holder(label)?;
            }
            if !queue.wait_for_release(&mut pause, deadline) {
                return Ok(None);
            }
        }
    }

    /// Waits until this thread holds the turnstile. The thread is the first thread of the queue.
    fn pass_turnstile<'q>(&self, queue: &'q SlotQueue, deadline: Instant) -> io::Result<Option<TurnstilePermit<'q>>> {
        let permit = TurnstilePermit { queue, file: LockFile::open(&self.path.join(TURNSTILE))? };
        // The waiting processes share the lock of this file.
        let waiting = LockFile::open(&self.path.join("waiting"))?;
        let left_at = queue.state.lock().left_turnstile_at;
        if let Some(end) = left_at.map(|left_at| left_at + TURNSTILE_PAUSE).filter(|end| *end > Instant::now()) {
            if waiting.try_lock()? {
                waiting.unlock()?;
            } else {
                std::thread::sleep(end.min(deadline).saturating_duration_since(Instant::now()));
            }
        }
        let (mut pause, mut is_announced) = (Duration::ZERO, false);
        loop {
            if permit.file.try_lock()? {
                if is_announced {
                    waiting.unlock()?;
                }
                return Ok(Some(permit));
            }
            is_announced = is_announced || waiting.try_lock_shared()?;
            if !queue.wait_for_release(&mut pause, deadline) {
                return Ok(None);
            }
        }
    }

    /// Locks `wanted` slots, or none. The caller is in the turnstile. After an error, the drop of the files releases
    /// their locks.
    fn lock_all(&self, queue: &SlotQueue, wanted: usize, label: &str) -> io::Result<Option<Vec<(usize, LockFile)>>> {
        let usable = self.usable();
        let wanted = wanted.min(usable);
        let mut held = Vec::with_capacity(wanted);
        let mut state = queue.state.lock();
        for number in 0..usable {
            if held.len() == wanted || held.len() + (usable - number) < wanted {
                break;
            }
            if state.held_here.contains(&number) {
                continue;
            }
            let file =
                state.unlocked_files.remove(&number).map_or_else(|| LockFile::open(&self.slot_path(number)), Ok)?;
            if file.try_lock()? {
                held.push((number, file));
            } else {
                state.unlocked_files.insert(number, file);
            }
        }
        if held.len() < wanted {
            state.release(held);
            return Ok(None);
        }
        held.iter().try_for_each(|(_, file)| file.write_holder(label))?;
        state.held_here.extend(held.iter().map(|(number, _)| *number));
        Ok(Some(held))
    }

    fn unavailable(&self, wanted: usize, io_error: Option<io::Error>) -> SlotsUnavailable {
        let usable = self.usable();
        let mut holders: Vec<(LockHolder, usize)> = Vec::new();
        for holder in (0..usable).filter_map(|number| holder_of(&self.slot_path(number))) {
            match holders.iter_mut().find(|(known, _)| *known == holder) {
                Some((_, slots)) => *slots += 1,
                None => holders.push((holder, 1)),
            }
        }
        let next = holder_of(&self.path.join(TURNSTILE));
        SlotsUnavailable { server: self.server.clone(), wanted: wanted.min(usable), usable, holders, next, io_error }
    }
}

impl Drop for TurnstilePermit<'_> {
    fn drop(&mut self) {
        // If this fails, the close of the file releases the lock.
        let _ = self.file.unlock();
        self.queue.state.lock().left_turnstile_at = Some(Instant::now());
    }
}

/// Replaces a file atomically: other processes never read a part of the text.
fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    for attempt in 0.. {
        let new = path.with_extension(format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        match File::create_new(&new) {
            // A killed process with the same id has left the file, or another user has put a link there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < MAX_REPLACE_ATTEMPTS => {}
            Err(error) => return Err(error),
            Ok(mut file) => return file.write_all(text.as_bytes()).and_then(|()| fs::rename(&new, path)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::{Child, Command, Stdio};
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use tempfile::TempDir;

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);
    const CHILD: &str = "DIESEL_SESSION_SLOTS_CHILD";

    fn seven_slots() -> (TempDir, Arc<ConnectionSlots>) {
        let temp = tempfile::tempdir().unwrap();
        let slots = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
        slots.set_capacity(9);
        (temp, slots)
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
        assert!(Arc::ptr_eq(&slots, &ConnectionSlots::of_server("a server").unwrap()));
        if task == "all" {
            let held = slots.acquire(99, &task, seconds_from_now(20)).unwrap();
            record('+', held.numbers().collect());
            thread::sleep(Duration::from_secs(60));
        }
        let held = slots.acquire(3, &task, seconds_from_now(60)).unwrap();
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
        let error = slots.acquire(1, "me", Instant::now()).unwrap_err().to_string();
        killed.kill().unwrap();
        killed.wait().unwrap();
        assert_eq!(slots.try_acquire(7, "me").map(|held| held.len()), Some(7));
        assert!(error.ends_with(&format!("; held: 7 by process {} (`all`)", killed.id())), "{error}");
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
                        let held = slots.acquire(1 + (thread + round) % 7, "some", seconds_from_now(60)).unwrap();
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
        let _three = slots.acquire(3, "orders", seconds_from_now(1)).unwrap();
        let _two = other.acquire(2, "users", seconds_from_now(1)).unwrap();
        let begin = Instant::now();
        thread::scope(|scope| {
            let first = scope.spawn(|| slots.acquire(4, "many", begin + Duration::from_millis(300)).unwrap_err());
            let waits = |slots: &ConnectionSlots| {
                holder_of(&slots.path.join(TURNSTILE)).is_some_and(|holder| holder.label == "many")
            };
            while !waits(&slots) {
                thread::sleep(SHORT);
            }
            assert!(slots.try_acquire(1, "few").is_none() && other.try_acquire(1, "few").is_none());
            for behind in [&slots, &other] {
                let error = behind.acquire(1, "few", begin + Duration::from_millis(100)).unwrap_err();
                assert_eq!(error.next.map(|holder| holder.label).as_deref(), Some("many"));
            }
            assert!(begin.elapsed() < Duration::from_millis(290));
            let error = first.join().unwrap();
            assert!(begin.elapsed() >= Duration::from_millis(300));
            let text = "tests on this machine share 7 connections of a server, and 4 did not become free in time; \
                        held: 3 by this process (`orders`), 2 by this process (`users`)";
            assert_eq!(error.to_string(), text);
        });
        assert_eq!(slots.acquire(2, "rest", seconds_from_now(1)).unwrap().numbers().collect::<Vec<_>>(), [5, 6]);
    }

    #[test]
    fn process_with_many_threads_lets_a_process_with_few_threads_pass() {
        let (temp, slots) = seven_slots();
        let other = ConnectionSlots::in_folder(temp.path(), "a server").unwrap();
        let (done, turns) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while done.load(Ordering::SeqCst) == 0 {
                        let _taken = slots.acquire(3, "many", seconds_from_now(60)).unwrap();
                        turns.fetch_add(1, Ordering::SeqCst);
                        thread::sleep(SHORT);
                    }
                });
            }
            for _ in 0..20 {
                thread::sleep(10 * SHORT);
                let _taken = other.acquire(3, "few", seconds_from_now(60)).unwrap();
            }
            done.store(1, Ordering::SeqCst);
        });
        // About 8 per round, most of them while `other` wants no slot. Without `TURNSTILE_PAUSE` there would be 50.
        assert!(turns.load(Ordering::SeqCst) < 20 * 20, "{turns:?}");
    }

    #[test]
    fn split_off_moves_slots_to_a_new_object() {
        let (_temp, slots) = seven_slots();
        let mut all = slots.acquire(100, "all", seconds_from_now(1)).unwrap();
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
