//! Which statements begin the transaction of a default scope, as the session, the pool and the server see it.

use diesel::dsl::{exists, max, sql};

use super::*;
use crate::unit_model::handles::Locks;
use crate::unit_model::rows::Table;
use crate::unit_model::tables::{NewUser, User, counters, users};

/// On which databases a statement begins the transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    Nowhere,
    /// Only the SQL shows that the statement reads. An enum of connections cannot build it without its connection.
    OnServersByEnum,
    /// On SQLite a function has no effect on other statements.
    OnServers,
    Everywhere,
}

use Begins::{Everywhere, Nowhere, OnServers, OnServersByEnum};

struct Case {
    name: &'static str,
    begins: Begins,
    send: fn(&Session<Conn>) -> Result<()>,
}

#[diesel::declare_sql_function]
extern "SQL" {
    fn abs(number: Integer) -> Integer;
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = users)]
#[allow(dead_code)]
struct Code {
    code: Option<i32>,
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = users)]
#[allow(dead_code)]
struct Absolute {
    #[diesel(select_expression = abs(users::n))]
    n: i32,
}

const READS: &[Case] = &[
    Case {
        name: "load",
        begins: Nowhere,
        send: |session| session.load::<i32>(users::table.select(users::n)).map(drop),
    },
    Case {
        name: "first",
        begins: Nowhere,
        send: |session| session.first::<i32>(users::table.select(users::n).order(users::id)).map(drop),
    },
    Case {
        name: "get_result",
        begins: Nowhere,
        send: |session| session.get_result::<i32>(users::table.find(1).select(users::n)).map(drop),
    },
    Case {
        name: "one_or_none",
        begins: Nowhere,
        send: |session| session.one_or_none::<i32, _>(users::table.filter(users::id.eq(9)).select(users::n)).map(drop),
    },
    Case { name: "count", begins: Nowhere, send: |session| session.count(users::table).map(drop) },
    Case {
        name: "exists",
        begins: Nowhere,
        send: |session| session.exists(users::table.filter(users::n.gt(0))).map(drop),
    },
    Case {
        name: "an aggregate",
        begins: Nowhere,
        send: |session| session.get_result::<Option<i32>>(users::table.select(max(users::n))).map(drop),
    },
    Case {
        name: "a subquery",
        begins: Nowhere,
        send: |session| {
            let counter = counters::table.filter(counters::id.eq(users::id));
            session.load::<i32>(users::table.filter(exists(counter)).select(users::id)).map(drop)
        },
    },
    Case {
        name: "a boxed query",
        begins: OnServersByEnum,
        send: |session| {
            let boxed = users::table.select(users::n).into_boxed();
            session.load::<i32>(boxed.filter(users::id.eq(1)).order(users::n.desc())).map(drop)
        },
    },
    Case {
        name: "as_select",
        begins: OnServersByEnum,
        send: |session| session.load::<Code>(users::table.select(Code::as_select())).map(drop),
    },
    Case {
        name: "a boxed as_select",
        begins: OnServersByEnum,
        send: |session| session.load::<Code>(users::table.select(Code::as_select()).into_boxed()).map(drop),
    },
    Case { name: "get", begins: Nowhere, send: |session| session.get::<User>(9).map(drop) },
    Case { name: "find", begins: Nowhere, send: |session| session.find::<User>(1).map(drop) },
    Case { name: "get_many", begins: Nowhere, send: |session| session.get_many::<User>([1, 2]).map(drop) },
    Case { name: "preload", begins: Nowhere, send: |session| session.preload::<User>([1, 2]) },
    Case { name: "track", begins: Nowhere, send: |session| session.track::<User>(users::table).map(drop) },
    Case {
        name: "track of an as_select",
        begins: OnServersByEnum,
        send: |session| session.track::<User>(users::table.select(User::as_select())).map(drop),
    },
    Case {
        name: "a read of an expired row",
        begins: Nowhere,
        send: |session| {
            let user = session.find::<User>(1)?;
            session.expire(&user)?;
            user.try_read().map(drop)
        },
    },
    Case { name: "refresh", begins: Nowhere, send: |session| session.refresh(&session.find::<User>(1)?) },
    Case {
        name: "a handle that was written and not flushed",
        begins: Nowhere,
        send: |session| {
            session.find::<User>(1)?.write().n = 7;
            Ok(())
        },
    },
    Case {
        name: "a function of the program",
        begins: OnServers,
        send: |session| session.load::<i32>(users::table.select(abs(users::n))).map(drop),
    },
    Case {
        name: "a boxed function of the program",
        begins: OnServers,
        send: |session| session.load::<i32>(users::table.select(abs(users::n)).into_boxed()).map(drop),
    },
    Case {
        name: "a boxed filter with a function of the program",
        begins: OnServers,
        send: |session| {
            let boxed = users::table.select(users::id).into_boxed();
            session.load::<i32>(boxed.filter(abs(users::n).eq(0))).map(drop)
        },
    },
    Case {
        name: "as_select with a function of the program",
        begins: OnServers,
        send: |session| session.load::<Absolute>(users::table.select(Absolute::as_select())).map(drop),
    },
    Case {
        name: "a literal of the program",
        begins: OnServers,
        send: |session| session.load::<i32>(users::table.select(sql::<Integer>("n"))).map(drop),
    },
];

const OTHERS: &[Case] = &[
    Case {
        name: "INSERT",
        begins: Everywhere,
        send: |session| {
            let new = (users::id.eq(7), users::n.eq(0), users::m.eq(0));
            session.execute(diesel::insert_into(users::table).values(new)).map(drop)
        },
    },
    Case {
        name: "UPDATE",
        begins: Everywhere,
        send: |session| session.execute(diesel::update(users::table.find(1)).set(users::n.eq(7))).map(drop),
    },
    Case {
        name: "UPDATE of no row",
        begins: Everywhere,
        send: |session| session.execute(diesel::update(users::table.find(9)).set(users::n.eq(7))).map(drop),
    },
    Case {
        name: "DELETE",
        begins: Everywhere,
        send: |session| session.execute(diesel::delete(counters::table.find(1))).map(drop),
    },
    Case {
        name: "a raw SELECT",
        begins: Everywhere,
        send: |session| session.load::<Value>(sql_query("SELECT 'raw' AS value")).map(drop),
    },
    Case {
        name: "raw SQL",
        begins: Everywhere,
        send: |session| session.execute(sql_query("UPDATE users SET n = 7")).map(drop),
    },
    Case {
        name: "with",
        begins: Everywhere,
        send: |session| session.with(|conn| users::table.select(users::n).load::<i32>(conn)).map(drop),
    },
    Case { name: "with_connection", begins: Everywhere, send: |session| session.with_connection(|_| Ok(())) },
    Case { name: "connection", begins: Everywhere, send: |session| session.connection().map(drop) },
    Case { name: "begin", begins: Everywhere, send: |session| session.begin() },
    Case { name: "savepoint", begins: Everywhere, send: |session| session.savepoint(|_| Ok(())) },
    Case {
        name: "savepoint that is rolled back",
        begins: Everywhere,
        send: |session| {
            let undone = session.savepoint(|_| Err::<(), _>(Trouble::OutOfStock("tea")));
            assert!(undone.is_err());
            Ok(())
        },
    },
    Case {
        name: "flush of a new row",
        begins: Everywhere,
        send: |session| {
            session.add(NewUser { id: 7, code: None, n: 0, m: 0 })?;
            session.flush()
        },
    },
    Case {
        name: "flush of a written row",
        begins: Everywhere,
        send: |session| {
            session.find::<User>(1)?.write().n = 7;
            session.flush()
        },
    },
    Case {
        name: "flush of a deleted row",
        begins: Everywhere,
        send: |session| {
            session.delete(&session.find::<User>(2)?)?;
            session.flush()
        },
    },
    Case {
        name: "a read that flushes first",
        begins: Everywhere,
        send: |session| {
            session.add(NewUser { id: 7, code: None, n: 0, m: 0 })?;
            session.count(users::table).map(drop)
        },
    },
];

const NOTHING: &[Case] = &[
    Case { name: "a session at rest", begins: Nowhere, send: |_| Ok(()) },
    Case { name: "flush of nothing", begins: Nowhere, send: |session| session.flush() },
    Case { name: "commit of nothing", begins: Nowhere, send: |session| session.commit() },
    Case { name: "rollback of nothing", begins: Nowhere, send: |session| session.rollback() },
    Case {
        name: "a new row that is not flushed",
        begins: Nowhere,
        send: |session| session.add(NewUser { id: 7, code: None, n: 0, m: 0 }).map(drop),
    },
];

/// Runs `body` with the tables of the model and some rows.
#[track_caller]
fn with_rows(options: fn(Config) -> Config, body: impl FnOnce(&Shop<Conn>) -> Result<()>) {
    run_test(setup(&DB, KIND, options).map(|setup| setup.fixture(model_tables())), KIND, |shop| {
        elsewhere(shop, crate::unit_model::tables::FIRST_ROWS);
        body(shop)
    });
}

#[test]
fn first_statement_that_may_write_begins_the_transaction() {
    with_rows(read_committed, |shop| {
        for case in [READS, OTHERS, NOTHING].into_iter().flatten() {
            let begins = match case.begins {
                Nowhere => false,
                OnServersByEnum => KIND != Kind::Sqlite && is_enum(),
                OnServers => KIND != Kind::Sqlite,
                Everywhere => true,
            };
            shop.scope().discard().run(|| {
                let session = DB.session()?;
                for round in 0..2 {
                    assert!(!is_begun(shop, &session), "before {}", case.name);
                    (case.send)(&session)?;
                    assert_eq!(is_begun(shop, &session), begins, "{} in round {round}", case.name);
                    // After reads it is the same.
                    session.rollback()?;
                    session.count(users::table)?;
                }
                Ok::<(), Error>(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn begin_eagerly_begins_the_transaction_at_every_statement() {
    with_rows(read_committed, |shop| {
        for case in [READS, OTHERS].into_iter().flatten() {
            shop.scope().begin_eagerly().discard().run(|| {
                let session = DB.session()?;
                assert!(!is_begun(shop, &session), "before {}", case.name);
                (case.send)(&session)?;
                assert!(is_begun(shop, &session), "{}", case.name);
                Ok::<(), Error>(())
            })?;
        }
        for case in NOTHING {
            shop.scope().begin_eagerly().discard().run(|| {
                let session = DB.session()?;
                (case.send)(&session)?;
                assert!(!is_begun(shop, &session), "{}", case.name);
                Ok::<(), Error>(())
            })?;
        }
        Ok(())
    });
}

#[test]
fn locking_read_begins_the_transaction() {
    with_rows(read_committed, |shop| {
        if !<Conn as Locks>::CAN_LOCK {
            return Ok(());
        }
        shop.context(|| {
            let session = DB.session()?;
            session.count(users::table)?;
            assert_eq!(<Conn as Locks>::lock(&session, Table::User, 1)?.len(), 1);
            assert!(is_begun(shop, &session));
            assert!(!shop.other_connection().write("UPDATE users SET n = 1 WHERE id = 1"), "the row is locked");
            Ok(())
        })
    });
}

#[test]
fn transaction_and_retry_are_in_a_transaction_from_their_start() {
    with_rows(read_committed, |shop| {
        shop.context(|| {
            let session = DB.session()?;
            session.count(users::table)?;
            session.transaction(|session| {
                assert!(is_begun(shop, session));
                Ok::<(), Error>(())
            })?;
            assert!(!is_begun(shop, &session));
            session.count(users::table)?;
            session.retry(1, |session| {
                assert!(is_begun(shop, session));
                Ok::<(), Error>(())
            })?;
            assert!(!is_begun(shop, &session));
            Ok(())
        })
    });
}

#[test]
fn reads_after_the_first_write_are_in_its_transaction() {
    with_rows(read_committed, |shop| {
        shop.context(|| {
            let session = DB.session()?;
            for n in [5, 6] {
                assert_ne!(session.first::<i32>(users::table.select(users::n))?, n);
                assert!(!is_begun(shop, &session));
                session.execute(diesel::update(users::table).set(users::n.eq(n)))?;
                assert_eq!(session.first::<i32>(users::table.select(users::n))?, n);
                assert!(is_begun(shop, &session));
                assert_ne!(shop.ask("SELECT CAST(n AS CHAR(9)) AS value FROM users")[0].trim(), n.to_string());
                session.commit()?;
                assert!(!is_begun(shop, &session));
            }
            Ok(())
        })
    });
}

#[test]
fn scopes_that_promise_more_than_read_committed_begin_at_the_first_statement() {
    with_rows(read_committed, |shop| {
        for level in [Isolation::RepeatableRead, Isolation::Serializable] {
            shop.scope().isolation(level).run(|| {
                let session = DB.session()?;
                session.count(users::table)?;
                assert!(is_begun(shop, &session), "{level:?}");
                Ok::<(), Error>(())
            })?;
        }
        shop.scope().read_only().run(|| {
            let session = DB.session()?;
            session.count(users::table)?;
            assert!(session.in_transaction());
            Ok::<(), Error>(())
        })?;
        if KIND == Kind::Postgres {
            shop.scope().search_path(["public"]).run(|| {
                let session = DB.session()?;
                session.count(users::table)?;
                assert!(is_begun(shop, &session));
                Ok::<(), Error>(())
            })?;
        }
        shop.scope().isolation(Isolation::ReadCommitted).run(|| {
            let session = DB.session()?;
            session.count(users::table)?;
            assert!(!is_begun(shop, &session));
            Ok::<(), Error>(())
        })
    });
}
