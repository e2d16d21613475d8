//! What is recorded, on every database.

use diesel_session::{Result, assert_queries};

use diesel_session::recorder::Recorder;

use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, logged};
use crate::for_each_database;

for_each_database!(every_database =>
    recorder_records_statements_and_their_locations,
    assert_queries_reports_a_wrong_number,
    recorder_warns_of_repeated_statements,
);

fn recorder_records_statements_and_their_locations<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let ((), recording) = Recorder::new().run(|| {
        app.context(|| -> Result<()> {
            let session = C::db().session()?;
            session.send(INSERT)?;
            assert!(session.savepoint(|session| session.send("SELECT nothing FROM nowhere")).is_err());
            let mut conn = session.connection()?;
            conn.transaction(|conn| conn.batch_execute(INSERT))?;
            drop(conn);
            assert_eq!(session.number(COUNT)?, 2);
            session.commit()
        })
        .unwrap();
    });
    assert_eq!(recording.total(), 4, "{recording}");
    let sent: Vec<_> = recording.statements().iter().filter(|statement| !statement.is_control()).collect();
    assert_eq!(sent.iter().map(|statement| statement.failed()).collect::<Vec<_>>(), [false, true, false, false]);
    for statement in &sent {
        assert!(statement.at().is_some_and(|at| at.file().ends_with("recorder.rs")), "{statement}");
        assert!(statement.binds().is_none());
    }
    assert_eq!(sent[0].sql(), INSERT);
    assert!(sent[3].duration() > std::time::Duration::ZERO);
    assert!(recording.statements().len() > 4, "a transaction was begun and ended");
    let ((), nothing) = Recorder::new().run(|| ());
    assert_eq!(nothing.total(), 0);
}

fn assert_queries_reports_a_wrong_number<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    let one = || app.context(|| C::db().session()?.number(COUNT));
    assert_eq!(assert_queries!(1, one).unwrap(), 0);
    let panic = std::panic::catch_unwind(|| assert_queries!(2, one)).unwrap_err();
    let message = panic.downcast_ref::<String>().unwrap();
    assert!(message.starts_with("2 statements were expected and 1 were sent"), "{message}");
    assert!(message.contains("FROM entries") && message.contains("recorder.rs:"), "{message}");
    // Nothing of it stays on the thread.
    assert_queries!(0, || ());
}

fn recorder_warns_of_repeated_statements<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    logged::listen();
    let before = logged::count();
    let (outer, recording) = Recorder::new().limit(3).run(|| {
        let ((), inner) = Recorder::new().with_binds().warn_repeats(3).run(|| {
            app.enter(|| {
                let session = C::db().session().unwrap();
                (0..5).for_each(|_| drop(session.number(COUNT)));
            });
        });
        inner
    });
    for recording in [&outer, &recording] {
        assert_eq!(recording.total(), 5);
        let (statement, times) = recording.repeated(4).next().unwrap();
        assert_eq!((statement.sql(), times), (COUNT, 5));
        assert_eq!(recording.repeated(5).count(), 0);
    }
    assert_eq!(recording.statements().len(), 3);
    assert!(recording.to_string().contains("more"), "{recording}");
    let me = format!("{}:", file!());
    let warned = |line: &String| line.contains("sent more than 3 times") && line.contains(&me);
    assert!(logged::lines_since(before).iter().any(warned));
    let values: Vec<_> = outer.statements().iter().filter(|statement| !statement.is_control()).collect();
    assert!(values.iter().all(|statement| statement.binds().is_some()));
}
