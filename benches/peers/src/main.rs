//! What one test costs with different ways of isolating tests, side by side in one run. In this folder:
//!
//! ```sh
//! cargo run --release -- --pin 0 --rounds 9
//! ```
//!
//! One test is three migrations that create a table each, an insert and a select. Each way has 100 such tests in a binary of its
//! own, built here first; where each has a process, 20 of them run. A PostgreSQL and a MariaDB are started for it in temporary folders, with the durability that they
//! have by default and `max_connections` of 100, and asked over their unix sockets.
//!
//! A number is the wall time of the processes, start and end included, divided by the tests. The ways take turns, and each
//! round begins with another one. The first round warms up and does not count: from then on what the kit makes once for a server is there. `--pin 0` binds this program and all that it starts, the servers too, to that CPU: between
//! two CPUs of a small virtual machine a round trip swings by a factor of 2 to 10.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "numbers are printed")]

mod arguments;
mod binaries;
mod contender;
#[path = "../../../tests/support/mod.rs"]
mod support;

use std::process::ExitCode;

use arguments::Arguments;
use binaries::Binaries;
use contender::{Contender, Mode};
use support::{Mariadb, Postgres, ROLE};

const POSTGRES: &str = "fsync = on\nfull_page_writes = on\nmax_connections = 100\nsuperuser_reserved_connections = 3\n\
    shared_buffers = 128MB\ndynamic_shared_memory_type = posix\n";

const MARIADB: [&str; 4] =
    ["--sync-frm=1", "--innodb-flush-log-at-trx-commit=1", "--innodb-flush-method=O_DIRECT", "--max-connections=100"];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let arguments = Arguments::read().and_then(Arguments::pinned)?;
    let binaries = Binaries::build()?;
    let postgres = Postgres::try_start_with(POSTGRES)?;
    let mariadb = Mariadb::start_with(&MARIADB);
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let file = folder.path().join("peers.sqlite").display().to_string();
    // Of the parameter `host` sqlx reads the folder too, but not without a host before it.
    let (postgres, mariadb) = (postgres.socket_url(ROLE).replace("@/", "@localhost/"), mariadb.socket_url(ROLE));

    let mut contenders = Vec::new();
    let mut add = |name, target, prefix, url: &str, parallel| {
        let binary = binaries.of(target)?;
        contenders.push(Contender { name, binary, prefix, url: url.to_owned(), parallel });
        Ok::<_, String>(())
    };
    // The first is the one that the others are compared with.
    // Its reader of URLs wants a host, even where the parameter `host` is the one that counts.
    add("PostgreSQL  #[sqlx::test]", "sqlx", "", &postgres.replacen("@/", "@localhost/", 1), true)?;
    add("PostgreSQL  by hand", "plain", "postgres::", &postgres, false)?;
    add("MariaDB     by hand", "plain", "mysql::", &mariadb, false)?;
    add("SQLite      by hand, a file", "plain", "sqlite::", &file, false)?;
    add("PostgreSQL  kit, Rollback", "kit", "postgres_rollback::", &postgres, true)?;
    add("PostgreSQL  kit, Schema", "kit", "postgres_schema::", &postgres, true)?;
    add("PostgreSQL  kit, Database", "kit", "postgres_database::", &postgres, true)?;
    add("MariaDB     kit, Rollback", "kit", "mysql_rollback::", &mariadb, true)?;
    add("MariaDB     kit, Database", "kit", "mysql_database::", &mariadb, true)?;
    add("SQLite      kit, Rollback", "kit", "sqlite_rollback::", &file, true)?;
    add("SQLite      kit, Database", "kit", "sqlite_database::", &file, true)?;
    add("SQLite      kit, memory", "kit", "sqlite_database::", ":memory:", true)?;
    let mut number = 0..;
    contenders.retain(|contender| number.next() == Some(0) || contender.name.starts_with(&arguments.only));
    println!("{arguments}");
    println!(
        "a warm-up round of each mode is not counted: the kit's templates and lanes, which stay on the server, are there"
    );
    for (number, mode) in (1..).zip(Mode::ALL) {
        if arguments.mode != 0 && arguments.mode != number {
            continue;
        }
        measure(&contenders, mode, arguments.rounds)?;
    }
    Ok(())
}

fn measure(contenders: &[Contender], mode: Mode, rounds: usize) -> Result<(), String> {
    let able = |contender: &&Contender| contender.parallel || !matches!(mode, Mode::Together(2..));
    let able: Vec<&Contender> = contenders.iter().filter(able).collect();
    let mut times = vec![Vec::new(); able.len()];
    // The first round warms up the servers, the page cache and the kit, and does not count.
    for round in 0..=rounds {
        for turn in 0..able.len() {
            let who = (round + turn) % able.len();
            let time = able[who].run(mode)?;
            if round > 0 {
                times[who].push(time);
            }
        }
    }
    println!("\n{:<34}{:>8}  [least .. most]       to #[sqlx::test]", mode.name(), "ms/test");
    for (contender, own) in able.iter().zip(&times) {
        let ratios = own.iter().zip(&times[0]).map(|(own, first)| own / first).collect();
        let ((least, median, most), (lowest, ratio, highest)) = (spread(own.clone()), spread(ratios));
        let range = format!("[{least:.1} .. {most:.1}]");
        println!("{:<34}{median:>8.1}  {range:<20}  {ratio:.3} [{lowest:.3} .. {highest:.3}]", contender.name);
    }
    Ok(())
}

/// Least, median, most.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[0], values[values.len() / 2], values[values.len() - 1])
}
