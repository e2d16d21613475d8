//! The child processes of these tests, and their parent's end of the pipes.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use diesel::{MysqlConnection, PgConnection, SqliteConnection};
use diesel_session::testing::{Fixture, TestApp, TestIsolation, TestSetup, run};
use diesel_session::{Config, Database, Error, Result, Session};

use super::server::{Server, chosen, ways};
use crate::fixtures::threads::{child_of, together};
use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection};

const URL: &str = "DIESEL_SESSION_TEST_CHILD";
const PART: &str = "DIESEL_SESSION_TEST_PART";
const SIGN: &str = "sign: ";

/// Tests in one process, and how many of them at a time.
pub(super) const TESTS: usize = 200;
pub(super) const AT_A_TIME: usize = 8;

/// A test that is rolled back, by name.
pub(super) const CUT: &str = "a test that is cut off";

/// Not a test of its own: every process comes in here.
#[test]
fn a_part() {
    let (Some(url), Ok(part)) = (child_of(), std::env::var(PART)) else { return };
    match url.split_once(':') {
        Some(("postgres", _)) => play::<PgConnection>(&url, &part),
        Some(("mysql", _)) => play::<MysqlConnection>(&url, &part),
        _ => play::<SqliteConnection>(&url, &part),
    }
}

fn play<C: TestConnection>(url: &str, part: &str) {
    let (verb, way) = part.split_once(' ').unwrap_or((part, ""));
    let setup = || setup::<C>(url, way_of(way));
    match verb {
        "one" => ordinary(setup()),
        "crowd" => {
            let next = AtomicUsize::new(0);
            together(AT_A_TIME, |_| {
                while let number @ 0..TESTS = next.fetch_add(1, Ordering::Relaxed) {
                    ordinary(self::setup::<C>(url, chosen(url, number)));
                }
            });
        }
        "panic" => run(setup(), |_| -> Result<()> {
            insert::<C>()?;
            C::db().session()?.send(INSERT)?;
            panic!("as it should")
        })
        .unwrap(),
        "fail" => run(setup(), |_| -> Result<()> {
            insert::<C>()?;
            Err(Error::from(diesel::result::Error::NotFound))
        })
        .unwrap(),
        "leak" => run(setup(), |app| {
            let (tell, told) = std::sync::mpsc::channel();
            thread::spawn(move || {
                let session = app.open_session().unwrap();
                session.send(INSERT).unwrap();
                tell.send(()).unwrap();
                loop {
                    thread::park();
                }
            });
            told.recv().unwrap();
        }),
        "exit" => run(setup(), |_| -> Result<()> {
            insert::<C>()?;
            C::db().session()?.send(INSERT)?;
            std::process::exit(3)
        })
        .unwrap(),
        "commit" => run(setup(), |_| {
            let session = C::db().session().unwrap();
            // It is noticed then or later.
            let _ = session.send(&format!("{INSERT}; COMMIT"));
        }),
        "loop" => {
            let ways = ways(url);
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for number in 0.. {
                            if number == 1 {
                                say("tested");
                            }
                            ordinary(self::setup::<C>(url, ways[number % ways.len()]).max_size(2));
                        }
                    });
                }
            });
        }
        "fill" | "leave_while_filling" => run(setup().fixture(Fixture::function("two rows", fill::<C>)), |_| {
            assert_eq!(C::db().session().unwrap().number(COUNT).unwrap(), 2);
        }),
        "many" => (0..11).for_each(|number| {
            let fixture = Fixture::sql("one of many", format!("CREATE TABLE made_{number} (id INTEGER)"));
            ordinary(setup().fixture(fixture));
        }),
        verb @ ("big" | "half") => {
            let bytes = if verb == "big" { 1_000_000 } else { 200_000 };
            let zeros = format!("INSERT INTO entries (author, message) VALUES ('Ada', hex(zeroblob({bytes})))");
            ordinary(setup().fixture(Fixture::sql("a big row", zeros)));
        }
        "bare" => bare::<C>(url, way_of(way)),
        "hold" => hold::<C>(url),
        "be_cut" => be_cut::<C>(url),
        other => panic!("{other}"),
    }
}

fn way_of(name: &str) -> TestIsolation {
    let all = [TestIsolation::Database, TestIsolation::Schema, TestIsolation::Rollback];
    all.into_iter().find(|way| format!("{way:?}") == name).unwrap_or_default()
}

fn setup<C: TestConnection>(url: &str, way: TestIsolation) -> TestSetup<C> {
    TestSetup::of(C::db()).config(Config::new(url)).isolation(way)
}

fn insert<C: TestConnection>() -> Result<()> {
    let session = C::db().session()?;
    assert_eq!(session.number(COUNT)?, 0);
    session.send(INSERT)?;
    session.commit()?;
    assert_eq!(session.number(COUNT)?, 1);
    session.rollback()
}

fn ordinary<C: TestConnection>(setup: TestSetup<C>) {
    run(setup, |_| insert::<C>()).unwrap();
}

fn committed<C: TestConnection>(test: &TestApp<C>) -> Result<i64> {
    test.open_session()?.number(COUNT)
}

/// Two rows, unless the process is to end before the second.
fn fill<C: TestConnection>(session: &Session<C>) -> Result<()> {
    session.send(INSERT)?;
    if std::env::var(PART).is_ok_and(|part| part.starts_with("leave")) {
        session.commit()?;
        std::process::exit(3);
    }
    session.send(INSERT)
}

/// Of a program without migrations.
fn bare<C: TestConnection>(url: &str, way: TestIsolation) {
    static ROWS: &str = "SELECT count(*) AS number FROM notes";
    let db: &'static Database<C> = Box::leak(Box::new(Database::without_migrations()));
    for _ in 0..2 {
        let setup = TestSetup::of(db).config(Config::new(url)).isolation(way);
        let setup =
            setup.fixture(Fixture::sql("a note", "CREATE TABLE notes (a INTEGER); INSERT INTO notes VALUES (1)"));
        run(setup, |_| -> Result<()> {
            let session = db.session()?;
            assert_eq!(session.number(ROWS)?, 1);
            session.send("INSERT INTO notes VALUES (2)")?;
            session.commit()?;
            assert_eq!(session.number(ROWS)?, 2);
            Ok(())
        })
        .unwrap();
    }
}

/// Has a test of each kind under way until it is told that that will do.
fn hold<C: TestConnection>(url: &str) {
    let begin = |way: &TestIsolation| setup::<C>(url, *way).max_size(1).start().unwrap();
    let tests: Vec<_> = ways(url).iter().map(begin).collect();
    for test in &tests {
        test.context(insert::<C>).unwrap();
    }
    say("holding");
    hear();
    for test in tests {
        assert_eq!(committed(&test).unwrap(), 1);
        test.finish().unwrap();
    }
}

/// Whose connections the parent ends: in a transaction, between two, and between two tests.
fn be_cut<C: TestConnection>(url: &str) {
    let setup = || setup::<C>(url, TestIsolation::Rollback);
    for open in [true, false] {
        let test = setup().named(CUT).start().unwrap();
        test.context(insert::<C>).unwrap();
        let session = test.open_session().unwrap();
        if open {
            session.send(INSERT).unwrap();
        }
        say("begun");
        hear();
        assert!(session.number(COUNT).is_err(), "it is not begun anew");
        assert!(session.rollback().is_ok() || open);
        drop(session);
        for _ in 0..2 {
            let error = committed(&test).unwrap_err();
            assert!(error.code() == "DS501" && error.to_string().contains(CUT), "{error}");
        }
        let error = test.finish().unwrap_err();
        assert!(error.code() == "DS501" && error.to_string().contains(CUT), "{error}");
        ordinary(setup());
        ordinary(setup());
    }
    say("between");
    hear();
    ordinary(setup());
    ordinary(setup());
}

/// Past the harness, which may capture what is printed.
fn say(sign: &str) {
    // A parent that has heard enough may be gone.
    let _ = writeln!(std::io::stdout(), "\n{SIGN}{sign}");
}

fn hear() {
    std::io::stdin().read_line(&mut String::new()).expect("the parent is there");
}

/// A process, under way or ended.
pub(super) struct Run {
    child: Child,
    orders: Option<ChildStdin>,
    signs: BufReader<ChildStdout>,
    ended: Option<(ExitStatus, String)>,
}

impl Run {
    pub(super) fn start(server: &Server, part: &str, more: &[(&str, &str)]) -> Self {
        let program = std::env::current_exe().expect("a running program");
        let mut command = Command::new(program);
        command.args(["--exact", "kit::child::a_part", "--nocapture"]).env_remove("DIESEL_SESSION_KEEP");
        command.env(URL, server.url()).env(PART, part).env("DIESEL_SESSION_TEST_DIR", server.folder.path());
        command.envs(more.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the same program starts once more");
        let orders = child.stdin.take();
        let signs = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, orders, signs, ended: None }
    }

    /// Waits until it says that.
    #[track_caller]
    pub(super) fn await_sign(&mut self, sign: &str) {
        let wanted = format!("{SIGN}{sign}");
        let mut line = String::new();
        while line.trim_end() != wanted {
            line.clear();
            if self.signs.read_line(&mut line).expect("UTF-8") == 0 {
                self.end();
                panic!("it never came to `{sign}`: {}", self.said());
            }
        }
    }

    pub(super) fn go_on(&mut self) {
        writeln!(self.orders.as_mut().expect("open until it has ended"), "go on").expect("the child listens");
    }

    pub(super) fn kill(mut self) {
        self.child.kill().expect("it is our child");
        self.end();
    }

    /// Waits for its end.
    pub(super) fn ended(mut self) -> Self {
        self.end();
        self
    }

    /// None where a signal ended it.
    pub(super) fn code(&self) -> Option<i32> {
        self.ended.as_ref().and_then(|(status, _)| status.code())
    }

    /// What it wrote on standard error.
    pub(super) fn said(&self) -> &str {
        self.ended.as_ref().map_or("", |(_, said)| said)
    }

    fn end(&mut self) {
        self.orders = None;
        // It writes less to the other pipe than that holds.
        let mut said = Vec::new();
        self.child.stderr.take().expect("piped").read_to_end(&mut said).expect("it is our child");
        let status = self.child.wait().expect("it is our child");
        self.ended = Some((status, String::from_utf8_lossy(&said).into_owned()));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // The story has failed.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
