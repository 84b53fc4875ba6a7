-- The views that look at sessions. One statement ends at each ";" that ends a line.

create or replace view "{schema}".live_nodes as
select n.node_id,
       n.name as node_name,
       n.state,
       n.address,
       n.expires_at - clock_timestamp() as lease_remaining,
       (select count(*) from "{schema}".sessions s where s.owner = n.node_id and {live}) as sessions,
       (select count(*) from "{schema}".streams t where t.sink = n.node_id and not t.closed) as streams,
       n.started_at,
       n.version
  from "{schema}".nodes n
 where n.state not in ('left', 'dead');

create or replace view "{schema}".live_sessions as
select case when s.transport = 'sse' and s.session_id ~ '-[0-9a-f]{32}$'
            then left(s.session_id, -32) || left(encode(sha256(convert_to(s.session_id, 'UTF8')), 'hex'), 32)
            else s.session_id end as session_id,
       n.name as node_name,
       s.owner as node_id,
       s.epoch,
       s.transport,
       s.protocol_version,
       s.client_name,
       s.client_version,
       -- subject@issuer via client, with the parts that are known; NULL for an anonymous session
       nullif(concat_ws(' via ',
                        nullif(concat_ws('@', s.principal_subject, s.principal_issuer), ''),
                        nullif(s.principal_client, '')), '') as principal,
       s.created_at,
       s.last_active_at,
       (select count(*) from "{schema}".requests r
         where r.session = s.id and r.rpc_id is not null and r.finished_at is null) as in_flight,
       (select count(*) from "{schema}".streams t where t.session = s.id and not t.closed and t.sink is not null) as open_streams
  from "{schema}".sessions s
  left join "{schema}".nodes n on n.node_id = s.owner
 where {live};
