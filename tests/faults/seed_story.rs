//! The example `seed_story`, run as its readers run it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::BigInt;
use tempfile::TempDir;

use crate::for_each_database;
use crate::support::{postgres, process, wait};

for_each_database!(only postgres =>
    example_on_its_own_server_reports_the_leak,
    example_on_a_server_in_use_refuses_and_cleans_up,
    interrupted_example_leaves_nothing,
);

/// The example as cargo builds it; the path of the program.
fn program() -> PathBuf {
    let build = Command::new(env!("CARGO"))
        .args(["build", "--all-features", "--example", "seed_story", "--message-format=json-render-diagnostics"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
    let messages = String::from_utf8(build.stdout).expect("UTF-8");
    let mut messages = messages.lines().map(|line| serde_json::from_str(line).expect("a message of cargo"));
    let program = messages.find_map(|message: serde_json::Value| match message["target"]["name"].as_str() {
        Some("seed_story") => message["executable"].as_str().map(PathBuf::from),
        _ => None,
    });
    program.expect("cargo names the program")
}

/// The story with a folder of its own for what is temporary; its servers work in there.
struct Story {
    folder: TempDir,
    command: Command,
}

impl Story {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("diesel-session-").tempdir().unwrap();
        // The server's user has to get in.
        fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new(program());
        command.env("TMPDIR", folder.path()).env_remove("DATABASE_URL").env_remove("SEED_STORY_AMONG_OTHERS");
        command.current_dir(folder.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { folder, command }
    }

    /// On the server of the tests, whose observer is another client.
    fn on(url: &str) -> Self {
        let mut story = Self::new();
        story.command.env("DATABASE_URL", url);
        story
    }

    fn among_others(mut self) -> Self {
        self.command.env("SEED_STORY_AMONG_OTHERS", "1");
        self
    }

    fn tell(&mut self) -> Output {
        let output = self.command.output().expect("the program starts");
        self.assert_nothing_left();
        output
    }

    /// Ctrl-C in the midst of the second way, with sessions open.
    fn interrupt(&mut self) {
        let mut child = self.command.spawn().expect("the program starts");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let in_the_midst = lines.map_while(Result::ok).any(|line| line.starts_with("  app   3 "));
        assert!(in_the_midst && process::signal("INT", &[child.id()]));
        assert!(!child.wait().unwrap().success());
        self.assert_nothing_left();
    }

    /// Neither a file, nor a process that works in the folder: the story itself, its keeper and its server do.
    #[track_caller]
    fn assert_nothing_left(&self) {
        let files =
            || fs::read_dir(self.folder.path()).unwrap().flatten().map(|entry| entry.path()).collect::<Vec<_>>();
        let left = || (files(), working_in(self.folder.path()));
        assert_eq!(wait::until_equal((vec![], vec![]), Duration::from_secs(20), left), (vec![], vec![]));
    }
}

/// The processes whose working folder is inside of `folder`, also one that was removed.
fn working_in(folder: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc").expect("/proc is mounted").flatten().map(|entry| entry.path());
    all.filter(|process| fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// The words of a row of the closing table, after its name.
fn row(told: &str, name: &str) -> Vec<String> {
    let row = told.lines().rev().find_map(|line| line.strip_prefix(name)).expect("a row of that name");
    row.split_whitespace().map(String::from).collect()
}

const DEFAULT: &str = "1. r2d2, default";
const SINGLE: &str = "2. r2d2, max_size(1)";
const SESSION: &str = "3. diesel-session";

/// Worked, failed at, most at once, opened, left.
#[track_caller]
fn assert_leak(told: &str, name: &str, worked: usize, slots: usize, left: usize) {
    let failed_at = worked + 1;
    let row = row(told, name);
    let wanted = format!("{worked} app {failed_at} {slots} {slots} {left}");
    assert_eq!(row[..6].join(" "), wanted, "{told}");
}

fn example_on_its_own_server_reports_the_leak() {
    let output = Story::new().tell();
    let told = text(&output.stdout);
    assert!(output.status.success(), "{told}{}", text(&output.stderr));
    // Of 20 slots two are reserved for superusers, and the observer has one.
    assert_leak(&told, DEFAULT, 1, 17, 10);
    assert_leak(&told, SINGLE, 17, 17, 17);
    assert_eq!(told.matches("FATAL:  remaining connection slots are reserved").count(), 2, "{told}");
    let session = row(&told, SESSION);
    assert_eq!((&*session[0], &*session[1], &*session[4]), ("19", "-", "0"), "{told}");
    assert!(told.ends_with("diesel-session ran all 19 and left 0.\n"), "{told}");
    assert!(told.lines().all(|line| line.chars().count() <= 100), "{told}");
}

fn example_on_a_server_in_use_refuses_and_cleans_up() {
    let database = postgres().create_database();
    let refused = Story::on(&database.url()).tell();
    assert_eq!(refused.status.code(), Some(1));
    let reason = text(&refused.stderr);
    assert!(reason.contains("other clients (1)") && reason.contains("SEED_STORY_AMONG_OTHERS"), "{reason}");

    Story::on(&database.url()).among_others().interrupt();
    let mut conn = PgConnection::establish(&database.url()).unwrap();
    let schemas = diesel::dsl::sql::<BigInt>("(SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'seed%')");
    assert_eq!(diesel::select(schemas).get_result::<i64>(&mut conn), Ok(0));
}

fn interrupted_example_leaves_nothing() {
    Story::new().interrupt();
}

#[test]
fn example_with_a_wrong_url_prints_one_line() {
    for (url, reason) in [
        ("", "the database URL is empty"),
        ("sqlite://story.sqlite", "is one for SQLite"),
        ("postgres://app:s3cret@127.0.0.1:1/app", "Connection refused"),
        ("postgres://app@127.0.0.1:1/app?options=-cwork_mem%3D1MB", "DATABASE_URL sets `options`"),
    ] {
        let output = Story::on(url).tell();
        let said = text(&output.stderr);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{said}");
        assert!(said.contains(reason) && said.lines().count() == 1 && !said.contains("s3cret"), "{said}");
    }
}
