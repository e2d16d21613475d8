//! The query methods do what the same Diesel calls do.

use diesel::dsl::{count_star, exists, max};

use super::*;

/// Three users, whose ids are 1 to 3, and three posts, committed.
fn seeded(shop: &Shop<Conn>) -> Result<()> {
    shop.run(|| {
        let session = DB.session()?;
        for (name, age) in [("Ada", Some(36)), ("Bob", None), ("Cid", Some(20))] {
            let new = (users::name.eq(name), users::age.eq(age));
            assert_eq!(session.execute(diesel::insert_into(users::table).values(new))?, 1);
        }
        for (user, title) in [(1, "Engine"), (1, "Notes"), (3, "Campeador")] {
            assert_eq!(post(&session, user, title)?, 1);
        }
        Ok(())
    })
}

/// The same query by the session and by Diesel itself.
macro_rules! same {
    ($session:expr, $as:ty, $query:expr) => {{
        let ours: Vec<$as> = $session.load($query)?;
        let diesels: Vec<$as> = $session.with(|conn| RunQueryDsl::load($query, conn))?;
        assert_eq!(ours, diesels);
        assert!(!ours.is_empty());
        let first: $as = $session.first($query)?;
        assert_eq!(first, $session.with(|conn| diesel::query_dsl::RunQueryDsl::first::<$as>($query, conn))?);
        ours
    }};
}

#[test]
fn load_and_first_return_what_diesel_returns() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            let all = same!(session, User, users::table.order(users::id));
            assert_eq!(all[1], User { id: 2, name: "Bob".into(), age: None });
            same!(session, User, users::table.order(users::id.desc()).select(User::as_select()));
            same!(session, (i32, String, Option<i32>), users::table.order(users::id));
            same!(session, (String, i32), users::table.order(users::id).select((users::name, users::id + 1)));
            same!(session, Option<i32>, users::table.order(users::id).select(users::age));
            same!(session, String, users::table.order(users::id).select(users::name).limit(2).offset(1));
            same!(session, User, users::table.filter(users::age.gt(30).or(users::name.like("C%"))).order(users::name));
            let rows = same!(
                session,
                (User, Post),
                posts::table.inner_join(users::table).order(posts::id).select((User::as_select(), Post::as_select()))
            );
            assert_eq!(rows.len(), 3);
            let rows = same!(
                session,
                (String, Option<String>),
                users::table
                    .left_join(posts::table)
                    .order((users::id, posts::id))
                    .select((users::name, posts::title.nullable()))
            );
            assert_eq!(rows[2], ("Bob".into(), None));
            same!(
                session,
                (i32, i64),
                posts::table.group_by(posts::user_id).order(posts::user_id).select((posts::user_id, count_star()))
            );
            Ok(())
        })
    });
}

#[test]
fn boxed_queries_and_sql_queries_are_queries() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            for (youngest, wanted) in [(None, 3), (Some(21), 1)] {
                let mut query = users::table.select(users::name).order(users::id).into_boxed();
                if let Some(youngest) = youngest {
                    query = query.filter(users::age.gt(youngest));
                }
                let found: Vec<String> = session.load(query)?;
                assert_eq!(found.len(), wanted);
            }
            let one: String = session.first(users::table.select(users::name).order(users::id).into_boxed())?;
            assert_eq!(one, "Ada");
            let place = if KIND == Kind::Postgres { "$1" } else { "?" };
            let by_name = || sql_query(format!("SELECT * FROM users WHERE name = {place}")).bind::<Text, _>("Cid");
            let found: Vec<User> = session.load(by_name())?;
            assert_eq!(found, [User { id: 3, name: "Cid".into(), age: Some(20) }]);
            assert_eq!(session.get_result::<User>(by_name())?, found[0]);
            assert_eq!(session.execute(sql_query("UPDATE users SET age = 1 WHERE age IS NULL"))?, 1);
            assert_eq!(session.count(users::table.filter(users::age.eq(1)))?, 1);
            Ok(())
        })
    });
}

#[test]
fn get_result_count_and_exists_return_one_value() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            assert_eq!(session.get_result::<i64>(users::table.count())?, 3);
            assert_eq!(session.get_result::<Option<i32>>(users::table.select(max(users::age)))?, Some(36));
            assert_eq!(session.get_result::<User>(users::table.find(2))?.name, "Bob");
            assert!(session.get_result::<bool>(diesel::select(exists(users::table.find(1))))?);
            assert_eq!(session.count(users::table)?, 3);
            assert_eq!(session.count(users::table.filter(users::age.is_null()))?, 1);
            assert_eq!(session.count(posts::table.inner_join(users::table).filter(users::name.eq("Ada")))?, 2);
            assert!(session.exists(users::table.filter(users::name.eq("Ada")))?);
            assert!(!session.exists(users::table.filter(users::name.eq("Zoe")))?);
            assert!(session.exists(posts::table.inner_join(users::table).filter(users::id.eq(3)))?);
            assert!(session.exists(users::table)?);
            Ok(())
        })
    });
}

#[test]
fn execute_returns_the_number_of_changed_rows() {
    test(|shop| {
        seeded(shop)?;
        shop.run(|| {
            let session = DB.session()?;
            let new = NewUser { name: "Dan", age: Some(50) };
            assert_eq!(session.execute(diesel::insert_into(users::table).values(&new))?, 1);
            let older =
                diesel::update(users::table.filter(users::age.is_not_null())).set(users::age.eq(users::age + 1));
            assert_eq!(session.execute(older)?, 3);
            assert_eq!(session.execute(diesel::update(users::table.find(2)).set(users::name.eq("Bea")))?, 1);
            assert_eq!(session.execute(diesel::delete(posts::table.filter(posts::user_id.eq(1))))?, 2);
            assert_eq!(session.execute(diesel::delete(users::table.find(77)))?, 0);
            let ages: Vec<Option<i32>> = session.load(users::table.order(users::id).select(users::age))?;
            assert_eq!(ages, [Some(37), None, Some(21), Some(51)]);
            Ok::<(), Error>(())
        })?;
        assert_eq!((shop.names().len(), shop.names()[1].as_str(), shop.titles().len()), (4, "Bea", 1));
        Ok(())
    });
}

#[test]
fn belonging_to_returns_the_children() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            let all: Vec<User> = session.load(users::table.order(users::id))?;
            let of_ada: Vec<Post> = session.load(Post::belonging_to(&all[0]).order(posts::id))?;
            assert_eq!(of_ada.iter().map(|post| post.title.as_str()).collect::<Vec<_>>(), ["Engine", "Notes"]);
            let of_all: Vec<Post> = session.load(Post::belonging_to(&all).order(posts::id))?;
            let grouped: Vec<usize> = of_all.grouped_by(&all).iter().map(Vec::len).collect();
            assert_eq!(grouped, [2, 0, 1]);
            assert_eq!(session.count(Post::belonging_to(&all[2]))?, 1);
            assert!(!session.exists(Post::belonging_to(&all[1]))?);
            Ok(())
        })
    });
}

#[test]
fn missing_row_is_not_found_and_optional_makes_it_none() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            let first: Result<User> = session.first(users::table);
            assert!(first.as_ref().is_err_and(Error::is_not_found));
            assert_is!(&first, Err(error) if error.kind() == ErrorKind::NotFound && error.location().expect("a location").line() == line!() - 2 && error.location().expect("a location").file().ends_with("queries.rs"));
            assert!(session.get_result::<User>(users::table.find(1)).is_err_and(|error| error.is_not_found()));
            let with: Result<User> = session.with(|conn| users::table.find(1).get_result(conn));
            assert!(with.as_ref().is_err_and(Error::is_not_found));
            assert_eq!(with.optional()?, None);
            assert_eq!(session.first::<User>(users::table).optional()?, None);
            assert_eq!(session.load::<User>(users::table)?, []);
            // Diesel's own result in the same closure.
            let own: QueryResult<User> = Err(diesel::result::Error::NotFound);
            assert_eq!(own.optional()?, None);
            // It is an answer, not a failure: the session goes on.
            add(&session, "Ada")?;
            assert_eq!(session.first::<User>(users::table).optional()?.map(|user| user.name), Some("Ada".into()));
            let other = session.first::<User>(users::table.filter(diesel::dsl::sql::<diesel::sql_types::Bool>("nonsense")));
            assert_error!(other.optional(), Query);
            Ok(())
        })
    });
}

#[test]
fn query_error_contains_diesels_error_and_its_location() {
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            session.commit()?;
            let error = add(&session, "Ada").expect_err("the name is taken");
            assert_eq!(kind_of(&error).map(|kind| format!("{kind:?}")), Some("UniqueViolation".into()));
            assert!(error.to_string().starts_with("DS302"), "{error}");
            assert!(
                error.kind() == ErrorKind::Query
                    && error.location().expect("a location").line() == line!() - 5
                    && error.location().expect("a location").file().ends_with("queries.rs"),
                "{error:?}"
            );
            Ok(())
        })
    });
}

#[test]
fn with_passes_diesels_connection_inside_the_transaction() {
    fn existing_code(conn: &mut Conn, name: &str) -> QueryResult<i64> {
        diesel::insert_into(users::table).values(users::name.eq(name)).execute(conn)?;
        users::table.count().get_result(conn)
    }
    test(|shop| {
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Ada")?;
            assert_eq!(session.with(|conn| existing_code(conn, "Bob"))?, 2);
            assert_eq!(names(&session)?, ["Ada", "Bob"]);
            session.rollback()?;
            assert_eq!(session.with(|conn| existing_code(conn, "Eve"))?, 1);
            session.commit()
        })?;
        assert_eq!(shop.names(), ["Eve"]);
        Ok(())
    });
}

/// The count, and how many rows there are.
macro_rules! counted {
    ($session:expr, $as:ty, $query:expr) => {{
        let rows: Vec<$as> = $session.load($query)?;
        assert_eq!($session.count($query)?, rows.len() as i64, "{}", stringify!($query));
        rows.len()
    }};
}

#[test]
fn count_is_the_number_of_rows_that_load_returns() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            let twice = diesel::dsl::sql::<Integer>("2");
            counted!(session, User, users::table);
            counted!(session, User, users::table.filter(users::name.eq("nobody")));
            assert_eq!(counted!(session, User, users::table.limit(2)), 2);
            assert_eq!(counted!(session, User, users::table.order(users::id).limit(5).offset(1)), 2);
            assert_eq!(counted!(session, User, users::table.order(users::name.desc())), 3);
            assert_eq!(counted!(session, User, users::table.limit(0)), 0);
            assert_eq!(counted!(session, i32, posts::table.select(posts::user_id).distinct()), 2);
            assert_eq!(counted!(session, i32, posts::table.group_by(posts::user_id).select(posts::user_id)), 2);
            counted!(
                session,
                (i32, i64),
                posts::table.group_by(posts::user_id).having(count_star().gt(1)).select((posts::user_id, count_star()))
            );
            counted!(session, i64, users::table.count());
            counted!(session, (User, Post), users::table.inner_join(posts::table));
            assert_eq!(counted!(session, (User, Option<Post>), users::table.left_join(posts::table)), 4);
            assert_eq!(
                counted!(
                    session,
                    (User, Post),
                    users::table.inner_join(posts::table).select((User::as_select(), Post::as_select())).limit(2)
                ),
                2
            );
            counted!(session, (i32, i32), users::table.select((users::id, users::id)).limit(2));
            counted!(session, User, users::table.select(User::as_select()).order(users::id).limit(1));
            counted!(session, i32, users::table.select(twice.clone()));
            for limit in 0..4 {
                let boxed = || users::table.order(users::id).limit(limit).into_boxed();
                counted!(session, User, boxed());
                counted!(session, User, boxed().filter(users::age.is_not_null()));
            }
            assert_eq!(session.count(sql_query("SELECT name FROM users WHERE id > 1"))?, 2);
            // A read that leaves nothing.
            session.commit()?;
            session.count(users::table.limit(2))?;
            assert_eq!(session.in_transaction(), KIND == Kind::Mariadb);
            session.commit()
        })
    });
}

#[test]
fn count_keeps_tracked_rows() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            add(&session, "Dan")?;
            assert_eq!(session.count(users::table.left_join(posts::table))?, 5);
            assert_eq!(session.count(users::table)?, 4, "a refused form of the query does no harm");
            session.commit()
        })?;
        assert_eq!(shop.names().len(), 4);
        Ok(())
    });
}

#[test]
fn one_requires_exactly_one_row() {
    test(|shop| {
        seeded(shop)?;
        shop.context(|| {
            let session = DB.session()?;
            let user: User = session.one(users::table.filter(users::name.eq("Bob")))?;
            assert_eq!(user.id, 2);
            assert_eq!(session.one::<String, _>(users::table.find(3).select(users::name))?, "Cid");
            // The query's own limit counts.
            assert_eq!(session.one::<User, _>(users::table.order(users::id.desc()).limit(1))?.id, 3);
            assert_eq!(session.one::<User, _>(users::table.order(users::id).limit(5).offset(2))?.id, 3);
            assert_eq!(session.one::<User, _>(users::table.find(1).into_boxed())?.name, "Ada");
            let pair: (User, Post) =
                session.one(users::table.inner_join(posts::table).filter(posts::title.eq("Campeador")))?;
            assert_eq!((pair.0.id, pair.1.user_id), (3, 3));
            assert_eq!(session.one::<User, _>(sql_query("SELECT * FROM users WHERE id = 2"))?.name, "Bob");
            let none: Result<User> = session.one(users::table.find(9));
            assert_is!(&none, Err(error) if error.kind() == ErrorKind::NotFound && error.location().expect("a location").line() == line!() - 1);
            assert_eq!(session.one_or_none::<User, _>(users::table.find(9))?, None);
            assert_eq!(session.one_or_none::<User, _>(users::table.find(1))?.map(|user| user.name), Some("Ada".into()));
            let several: Result<User> = session.one(users::table);
            assert_is!(&several, Err(error) if error.kind() == ErrorKind::TooManyRows && error.location().expect("a location").line() == line!() - 1);
            let error = several.expect_err("there are three");
            assert!(
                error.code() == "DS317" && !error.is_not_found() && error.to_string().contains("`first`"),
                "{error}"
            );
            assert_error!(session.one_or_none::<User, _>(users::table.order(users::id)), TooManyRows);
            assert_error!(session.one::<User, _>(sql_query("SELECT * FROM users")), TooManyRows);
            assert_error!(session.one::<(User, Post), _>(users::table.inner_join(posts::table)), TooManyRows);
            session.commit()
        })
    });
}
