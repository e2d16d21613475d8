-- `written_at` is in UTC, whatever time zone the session is in that writes.
CREATE TABLE entries (
    id SERIAL PRIMARY KEY,
    author VARCHAR(100) NOT NULL CHECK (author <> ''),
    message VARCHAR(2000) NOT NULL CHECK (message <> ''),
    written_at TIMESTAMP NOT NULL DEFAULT (CURRENT_TIMESTAMP AT TIME ZONE 'UTC')
);
