//! The number of free slots of the server before the story begins.

use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{BigInt, Text};

// An ordinary role sees neither kind nor name of other roles' sessions. Sessions with a database and a user are clients.
const QUERY: &str = "
SELECT split_part(current_setting('server_version'), ' ', 1) AS version,
    current_database()::text AS database,
    current_setting('max_connections')::bigint AS max_connections,
    CASE WHEN (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN 0
        ELSE current_setting('superuser_reserved_connections')::bigint
            + coalesce(current_setting('reserved_connections', true)::bigint, 0)
    END AS reserved,
    (SELECT count(*) FROM pg_stat_activity
        WHERE datid IS NOT NULL AND usesysid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
            AND coalesce(application_name, '') <> $1
    ) AS others";

#[derive(QueryableByName)]
pub(crate) struct Slots {
    #[diesel(sql_type = Text)]
    pub(crate) version: String,
    #[diesel(sql_type = Text)]
    pub(crate) database: String,
    #[diesel(sql_type = BigInt)]
    pub(crate) max_connections: i64,
    /// The number of slots that the role of the story cannot use.
    #[diesel(sql_type = BigInt)]
    pub(crate) reserved: i64,
    /// The number of sessions of other clients, including the observer's.
    #[diesel(sql_type = BigInt)]
    pub(crate) others: i64,
}

impl Slots {
    /// Queries the server as the story's role, whose sessions have the name `tag`.
    pub(crate) fn measure(conn: &mut PgConnection, tag: &str) -> QueryResult<Self> {
        sql_query(QUERY).bind::<Text, _>(tag).get_result(conn)
    }

    pub(crate) fn free(&self) -> usize {
        usize::try_from(self.max_connections - self.reserved - self.others).unwrap_or_default()
    }
}
