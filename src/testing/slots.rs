//! How many connections all test processes of one machine have open on one server: numbered slots, each a locked file. Waiting
//! takes no connection, and what a process held is free when it has ended, however it ended.
//!
//! Slots are taken all at once or not at all, behind a turnstile that lets one thread of the machine try at a time: nobody holds
//! some and waits for the rest of them, and who wants many is not overtaken for ever by those who want few. At the turnstile the
//! threads of a process stand in a queue and send the first one forward. Locks with a deadline do not exist, so that one looks
//! again and again.
//!
//! The folder must not be cleared while tests run: those who hold files that are gone do not see those who make new ones.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, fs, io, process};

use parking_lot::Mutex;

use super::folder::{folder, make_inside};
use super::lock_file::{self, LockFile, Who, holder};
use super::queue::{Queue, QueuePlace};
use crate::dialect::fnv1a;
use crate::process::PerProcess;

/// Slots of a server that nobody has asked yet how many connections it takes.
const UNASKED: usize = 4;
/// Connections of a server that are left to others: its administrators, a console.
const LEFT: usize = 2;
/// A process that has just been through the turnstile leaves it alone for so long if others wait: each of them looks once then.
const GIVE_WAY: Duration = Duration::from_millis(6);
/// How many names of a file that is to be renamed may be taken.
const MOST_ATTEMPTS: usize = 100;

/// The slots of one server.
#[derive(Debug)]
pub(crate) struct Slots {
    server: String,
    path: PathBuf,
    queue: PerProcess<Queue>,
}

/// Slots that are held; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Taken {
    slots: Arc<Slots>,
    held: Vec<(usize, LockFile)>,
    process: u32,
}

/// Why there were no slots.
#[derive(Debug)]
pub(crate) struct Busy {
    pub(crate) server: String,
    pub(crate) wanted: usize,
    pub(crate) usable: usize,
    /// Each with the number of slots it has.
    pub(crate) holders: Vec<(Who, usize)>,
    /// Who is at the turnstile and gets the next ones.
    pub(crate) ahead: Option<Who>,
    /// What the file system had against it.
    pub(crate) trouble: Option<io::Error>,
}

impl Slots {
    /// The slots of the server with this key: one object in each process, one folder for all of them. The key is not secret.
    pub(crate) fn of(server: &str) -> Result<Arc<Self>, String> {
        static ALL: PerProcess<Mutex<HashMap<String, Arc<Slots>>>> = PerProcess::new();
        let mut all = ALL.get_or_init(Mutex::default).lock();
        if let Some(known) = all.get(server) {
            return Ok(Arc::clone(known));
        }
        let new = Self::within(folder()?, server)?;
        all.insert(server.to_owned(), Arc::clone(&new));
        Ok(new)
    }

    /// How many connections the server takes, as whoever asked it last wrote down.
    pub(crate) fn capacity(&self) -> Option<usize> {
        let file = lock_file::open(&self.path.join("capacity"), OpenOptions::new().read(true)).ok()?;
        lock_file::text(&file).ok()?.trim().parse().ok()
    }

    /// Tells all processes what the server said.
    pub(crate) fn set_capacity(&self, connections: usize) {
        if self.capacity() != Some(connections)
            && let Err(error) = replace(&self.path.join("capacity"), &connections.to_string())
        {
            crate::wording::log_line!(
                warn,
                "diesel_session::testing",
                "how many connections {} takes cannot be told to other tests: {error}",
                self.server
            );
        }
    }

    /// A file that all processes of this machine find here.
    pub(crate) fn file(&self, name: &str) -> io::Result<LockFile> {
        LockFile::open(&self.path.join(name))
    }

    /// Takes so many slots at once, or all there are where that is less, and waits its turn for them. `label` says what they are
    /// for. A deadline that is over leaves one try.
    pub(crate) fn take(self: &Arc<Self>, wanted: usize, label: &str, deadline: Instant) -> Result<Taken, Busy> {
        match self.in_turn(wanted, label, deadline) {
            Ok(Some(taken)) => Ok(taken),
            Ok(None) => Err(self.busy(wanted, None)),
            Err(trouble) => Err(self.busy(wanted, Some(trouble))),
        }
    }

    /// Whether somebody on this machine waits for slots.
    pub(crate) fn is_wanted(&self) -> bool {
        let turn = LockFile::open(&self.path.join("turn"));
        turn.and_then(|turn| turn.try_lock_shared()).is_ok_and(|is_free| !is_free)
    }

    /// The same without waiting. `None` also where another one is trying at this moment, or waits already.
    pub(crate) fn try_take(self: &Arc<Self>, wanted: usize, label: &str) -> Option<Taken> {
        self.in_turn(wanted, label, Instant::now()).ok().flatten()
    }
}

impl Taken {
    /// How many; fewer than were wanted where there are no more.
    pub(crate) fn len(&self) -> usize {
        self.held.len()
    }

    /// Their numbers, from 0. While they are held nobody else on this machine has them for this server.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> {
        self.held.iter().map(|(number, _)| *number)
    }

    /// Gives `count` of them, or all where there are fewer, to another owner.
    pub(crate) fn split_off(&mut self, count: usize) -> Self {
        let held = self.held.split_off(self.held.len().saturating_sub(count));
        Self { slots: Arc::clone(&self.slots), held, process: self.process }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // After a fork these openings are also the parent's, who has not given them back.
        if self.process == process::id() {
            self.slots.queue().free(self.held.drain(..));
        }
    }
}

impl Busy {
    /// The text, with what can be done; `patience` is the name of what says how long a caller waits.
    pub(super) fn with_advice(&self, patience: &str) -> String {
        match self.trouble {
            Some(_) => {
                format!("{self}. Make the folder of the tests usable, or name another with DIESEL_SESSION_TEST_DIR")
            }
            None => format!("{self}. Run fewer tests at once, or wait longer ({patience})"),
        }
    }
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, wanted, usable, holders, ahead, trouble } = self;
        if let Some(trouble) = trouble {
            return write!(f, "the files by which tests share the connections of {server} cannot be used: {trouble}");
        }
        write!(
            f,
            "tests on this machine share {usable} connections of {server}, and {wanted} did not become free in time"
        )?;
        for (number, (who, slots)) in holders.iter().enumerate() {
            write!(f, "{} {slots} by {who}", if number == 0 { "; held:" } else { "," })?;
        }
        match ahead {
            Some(who) => write!(f, "; next is {who}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Busy {}

/// The turnstile, while it is ours.
struct Turn<'l> {
    queue: &'l Queue,
    file: LockFile,
}

impl Slots {
    fn within(folder: &Path, server: &str) -> Result<Arc<Self>, String> {
        let path = folder.join(format!("server-{:016x}", fnv1a([server.as_bytes()])));
        let name = path.join("server");
        let made = make_inside(&path).and_then(|()| if name.exists() { Ok(()) } else { replace(&name, server) });
        made.map_err(|error| format!("tests cannot share the connections of {server}: {}: {error}", path.display()))?;
        Ok(Arc::new(Self { server: server.to_owned(), path, queue: PerProcess::new() }))
    }

    fn queue(&self) -> &Queue {
        self.queue.get_or_init(Queue::default)
    }

    fn usable(&self) -> usize {
        self.capacity().map_or(UNASKED, |connections| connections.saturating_sub(LEFT).max(1))
    }

    fn slot(&self, number: usize) -> PathBuf {
        self.path.join(format!("slot-{number}"))
    }

    fn in_turn(self: &Arc<Self>, wanted: usize, label: &str, deadline: Instant) -> io::Result<Option<Taken>> {
        let queue = self.queue();
        let Some(_place) = QueuePlace::first(queue, deadline) else { return Ok(None) };
        let Some(turn) = self.turn(queue, deadline)? else { return Ok(None) };
        let mut pause = Duration::ZERO;
        loop {
            if let Some(held) = self.try_all(queue, wanted, label)? {
                return Ok(Some(Taken { slots: Arc::clone(self), held, process: process::id() }));
            }
            if pause.is_zero() {
                turn.file.sign(label)?;
            }
            if !queue.pause(&mut pause, deadline) {
                return Ok(None);
            }
        }
    }

    /// Waits for the turnstile; for the first of the queue.
    fn turn<'l>(&self, queue: &'l Queue, deadline: Instant) -> io::Result<Option<Turn<'l>>> {
        let turn = Turn { queue, file: LockFile::open(&self.path.join("turn"))? };
        // Those who wait share the lock of this file.
        let waiting = LockFile::open(&self.path.join("waiting"))?;
        let left = queue.state.lock().left;
        if let Some(way_is_given) = left.map(|left| left + GIVE_WAY).filter(|until| *until > Instant::now()) {
            if waiting.try_lock()? {
                waiting.unlock()?;
            } else {
                std::thread::sleep(way_is_given.min(deadline).saturating_duration_since(Instant::now()));
            }
        }
        let (mut pause, mut shown) = (Duration::ZERO, false);
        loop {
            if turn.file.try_lock()? {
                if shown {
                    waiting.unlock()?;
                }
                return Ok(Some(turn));
            }
            shown = shown || waiting.try_lock_shared()?;
            if !queue.pause(&mut pause, deadline) {
                return Ok(None);
            }
        }
    }

    /// All that are wanted, or none; for the one in the turnstile. What an error leaves locked here ends with its opening.
    fn try_all(&self, queue: &Queue, wanted: usize, label: &str) -> io::Result<Option<Vec<(usize, LockFile)>>> {
        let usable = self.usable();
        let wanted = wanted.min(usable);
        let mut held = Vec::with_capacity(wanted);
        let mut state = queue.state.lock();
        for number in 0..usable {
            if held.len() == wanted || held.len() + (usable - number) < wanted {
                break;
            }
            if state.ours.contains(&number) {
                continue;
            }
            let file = state.idle.remove(&number).map_or_else(|| LockFile::open(&self.slot(number)), Ok)?;
            if file.try_lock()? {
                held.push((number, file));
            } else {
                state.idle.insert(number, file);
            }
        }
        if held.len() < wanted {
            state.put_back(held);
            return Ok(None);
        }
        held.iter().try_for_each(|(_, file)| file.sign(label))?;
        state.ours.extend(held.iter().map(|(number, _)| *number));
        Ok(Some(held))
    }

    fn busy(&self, wanted: usize, trouble: Option<io::Error>) -> Busy {
        let usable = self.usable();
        let mut holders: Vec<(Who, usize)> = Vec::new();
        for who in (0..usable).filter_map(|number| holder(&self.slot(number))) {
            match holders.iter_mut().find(|(known, _)| *known == who) {
                Some((_, slots)) => *slots += 1,
                None => holders.push((who, 1)),
            }
        }
        let ahead = holder(&self.path.join("turn"));
        Busy { server: self.server.clone(), wanted: wanted.min(usable), usable, holders, ahead, trouble }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Where it never was locked this does nothing; where it fails, closing does it.
        let _ = self.file.unlock();
        self.queue.state.lock().left = Some(Instant::now());
    }
}

/// Writes a file that others see whole or not at all.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    for attempt in 0.. {
        let new = path.with_extension(format!("{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        match File::create_new(&new) {
            // A process of that number that was killed has left it, or somebody else has put a link there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < MOST_ATTEMPTS => {}
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

    fn seven() -> (TempDir, Arc<Slots>) {
        let temp = tempfile::tempdir().unwrap();
        let slots = Slots::within(temp.path(), "a server").unwrap();
        slots.set_capacity(9);
        (temp, slots)
    }

    fn soon(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    /// This test in a process of its own. What it does is told by `what`.
    fn child(temp: &TempDir, what: &str) -> Child {
        let mut program = Command::new(std::env::current_exe().unwrap());
        program.args(["--exact", "testing::slots::tests::a_process_of_its_own"]).env(CHILD, what);
        program.env("DIESEL_SESSION_TEST_DIR", temp.path()).stdout(Stdio::null()).spawn().unwrap()
    }

    #[test]
    fn a_process_of_its_own() {
        let Ok(what) = std::env::var(CHILD) else { return };
        let mut events = OpenOptions::new().create(true).append(true).open(folder().unwrap().join("events")).unwrap();
        let mut tell = |sign, numbers: Vec<usize>| {
            let lines: String = numbers.iter().map(|number| format!("{sign}{number}\n")).collect();
            events.write_all(lines.as_bytes()).unwrap();
        };
        let slots = Slots::of("a server").unwrap();
        assert!(Arc::ptr_eq(&slots, &Slots::of("a server").unwrap()));
        if what == "all" {
            let taken = slots.take(99, &what, soon(20)).unwrap();
            tell('+', taken.numbers().collect());
            thread::sleep(Duration::from_secs(60));
        }
        let taken = slots.take(3, &what, soon(60)).unwrap();
        tell('+', taken.numbers().collect());
        thread::sleep(Duration::from_millis(20));
        tell('-', taken.numbers().collect());
    }

    #[test]
    fn twenty_processes_share_seven() {
        let (temp, _slots) = seven();
        let children: Vec<Child> = (0..20).map(|number| child(&temp, &number.to_string())).collect();
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        let (mut held, mut most, mut times) = (BTreeSet::new(), 0, 0);
        for queue in fs::read_to_string(temp.path().join("events")).unwrap().lines() {
            match queue.split_at(1) {
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
    fn what_a_killed_process_held_is_free_at_once() {
        let (temp, slots) = seven();
        let mut killed = child(&temp, "all");
        let end = soon(20);
        while !fs::read_to_string(temp.path().join("events")).is_ok_and(|told| told.lines().count() == 7) {
            assert!(Instant::now() < end, "the child is not there");
            thread::sleep(SHORT);
        }
        let error = slots.take(1, "me", Instant::now()).unwrap_err().to_string();
        killed.kill().unwrap();
        killed.wait().unwrap();
        assert_eq!(slots.try_take(7, "me").map(|taken| taken.len()), Some(7));
        assert!(error.ends_with(&format!("; held: 7 by process {} (`all`)", killed.id())), "{error}");
    }

    #[test]
    fn all_at_once_or_none_and_without_deadlock() {
        let (_temp, slots) = seven();
        let (held, turns) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for thread in 0..8 {
                let (slots, held, turns) = (&slots, &held, &turns);
                scope.spawn(move || {
                    for round in 0..20 {
                        let taken = slots.take(1 + (thread + round) % 7, "some", soon(60)).unwrap();
                        assert_eq!(taken.len(), 1 + (thread + round) % 7);
                        assert!(held.fetch_add(taken.len(), Ordering::SeqCst) + taken.len() <= 7);
                        thread::yield_now();
                        held.fetch_sub(taken.len(), Ordering::SeqCst);
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(turns.into_inner(), 160);
    }

    #[test]
    fn the_deadline_holds_in_the_queue_too_and_the_error_tells_who() {
        let (temp, slots) = seven();
        // As another process has it.
        let other = Slots::within(temp.path(), "a server").unwrap();
        let _three = slots.take(3, "orders", soon(1)).unwrap();
        let _two = other.take(2, "users", soon(1)).unwrap();
        let begin = Instant::now();
        thread::scope(|scope| {
            let first = scope.spawn(|| slots.take(4, "many", begin + Duration::from_millis(300)).unwrap_err());
            let waits = |slots: &Slots| holder(&slots.path.join("turn")).is_some_and(|who| who.label == "many");
            while !waits(&slots) {
                thread::sleep(SHORT);
            }
            assert!(slots.try_take(1, "few").is_none() && other.try_take(1, "few").is_none());
            for behind in [&slots, &other] {
                let error = behind.take(1, "few", begin + Duration::from_millis(100)).unwrap_err();
                assert_eq!(error.ahead.map(|who| who.label).as_deref(), Some("many"));
            }
            assert!(begin.elapsed() < Duration::from_millis(290));
            let error = first.join().unwrap();
            assert!(begin.elapsed() >= Duration::from_millis(300));
            let text = "tests on this machine share 7 connections of a server, and 4 did not become free in time; \
                        held: 3 by this process (`orders`), 2 by this process (`users`)";
            assert_eq!(error.to_string(), text);
        });
        assert_eq!(slots.take(2, "rest", soon(1)).unwrap().numbers().collect::<Vec<_>>(), [5, 6]);
    }

    #[test]
    fn a_process_with_many_threads_gives_way_to_one_with_few() {
        let (temp, slots) = seven();
        let other = Slots::within(temp.path(), "a server").unwrap();
        let (done, turns) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while done.load(Ordering::SeqCst) == 0 {
                        let _taken = slots.take(3, "many", soon(60)).unwrap();
                        turns.fetch_add(1, Ordering::SeqCst);
                        thread::sleep(SHORT);
                    }
                });
            }
            for _ in 0..20 {
                thread::sleep(10 * SHORT);
                let _taken = other.take(3, "few", soon(60)).unwrap();
            }
            done.store(1, Ordering::SeqCst);
        });
        // About 8 a round, most of them while it wanted nothing; 50 where nobody gives way.
        assert!(turns.load(Ordering::SeqCst) < 20 * 20, "{turns:?}");
    }

    #[test]
    fn parts_go_to_other_owners() {
        let (_temp, slots) = seven();
        let mut all = slots.take(100, "all", soon(1)).unwrap();
        let part = all.split_off(3);
        assert_eq!((all.len(), part.numbers().collect::<Vec<_>>()), (4, vec![4, 5, 6]));
        assert_eq!(all.split_off(0).len(), 0);
        drop(all);
        assert!(slots.try_take(5, "five").is_none());
        let again = slots.try_take(4, "four").unwrap();
        drop((part, again));
        assert_eq!(slots.try_take(7, "all").unwrap().len(), 7);
    }

    #[test]
    fn what_the_server_said_is_known_to_all() {
        let temp = tempfile::tempdir().unwrap();
        let slots = Slots::within(temp.path(), "a server").unwrap();
        assert_eq!((slots.capacity(), slots.usable()), (None, 4));
        for (said, usable) in [(20, 18), (3, 1), (0, 1)] {
            slots.set_capacity(said);
            let other = Slots::within(temp.path(), "a server").unwrap();
            assert_eq!((other.capacity(), other.usable()), (Some(said), usable));
        }
        assert_eq!(Slots::within(temp.path(), "another").unwrap().capacity(), None);
        assert_eq!(fs::read_to_string(slots.path.join("server")).unwrap(), "a server");
    }
}
