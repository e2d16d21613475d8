//! `#[sqlx::test]`: a database for each test.

#[macro_use]
mod common;

macro_rules! tests {
    ($($name:ident)*) => { $(
        #[sqlx::test(migrations = "migrations/sqlx")]
        async fn $name(pool: sqlx::PgPool) {
            sqlx::query("INSERT INTO users (name) VALUES ($1)").bind("Ada").execute(&pool).await.unwrap();
            let rows: Vec<(i32, String)> = sqlx::query_as("SELECT id, name FROM users").fetch_all(&pool).await.unwrap();
            assert_eq!(rows, [(1, "Ada".to_owned())]);
        }
    )* };
}

many!(tests);
